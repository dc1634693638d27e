"""The gateway's view of the model runners: which are up, whose turn it is, and what they stream.

A module of ch09_api_gateway.py. Section 9.3.
"""

import asyncio
import contextlib
import hashlib
import json
import math
import random
import re
import time
from collections.abc import AsyncIterator, Collection, Iterator
from dataclasses import dataclass

import anyio
import httpx

MALFORMED = (AttributeError, KeyError, RecursionError, TypeError, ValueError)
EVENT_END = re.compile(rb"\r?\n\r?\n")
END_S = 1.0  # from [DONE] to the end of its response: then the connection can be used again


class Failed(Exception):
    """A backend gave no answer, and nothing of one has reached the client: another may be asked."""

    def __init__(self, why: str, busy: bool = False):
        super().__init__(why)
        self.busy = busy  # it has said so, which is no fault


@dataclass
class Replica:
    """One runner. Several may serve the same backend: a name is a version of the model."""

    backend: str
    name: str  # backend/number
    url: str
    up: bool = False
    load: int = 0  # requests that it works on for us
    served: int = 0

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        self.load += 1
        self.served += 1
        try:
            yield
        finally:
            self.load -= 1


class Backends:
    """Weights say which share of the requests a backend gets; its least loaded replica takes one."""

    def __init__(
        self, urls: list[tuple[str, str]], client: httpx.AsyncClient, check_every_s: float
    ):
        self.client = client
        self.check_every_s = check_every_s
        self.replicas: list[Replica] = []
        for name, url in urls:
            number = sum(replica.backend == name for replica in self.replicas) + 1
            self.replicas.append(Replica(name, f"{name}/{number}", url.rstrip("/")))
        self.weights = {name: 1.0 for name, _ in urls}

    def choose(self, point: float, tried: Collection[str] = ()) -> Replica | None:
        """The replica for a request whose point in [0, 1) is given; None when nobody is left."""
        able = [r for r in self.replicas if r.up and r.name not in tried]
        names = {replica.backend for replica in able}
        shares = {name: weight for name, weight in self.weights.items() if weight > 0}
        chosen = None
        while shares and chosen not in names:
            chosen, point = share_at(point, shares)
            del shares[chosen]  # if it is down its own users go elsewhere, and nobody else's
        same = [replica for replica in able if replica.backend == chosen]
        return min(same, key=lambda r: (r.load, r.served), default=None)

    def set_weights(self, wanted: dict) -> None:
        """Change some or all weights; the order is that of the shares. ValueError if it cannot be."""
        if not isinstance(wanted, dict) or not wanted:
            raise ValueError('the body is no JSON object {"backend": weight}')
        for name, weight in wanted.items():
            if name not in self.weights:
                raise ValueError(f"there is no backend {name!r}, only {', '.join(self.weights)}")
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight) or weight < 0:
                raise ValueError(f"the weight of {name} is no number of 0 or more")
        weights = wanted | {n: w for n, w in self.weights.items() if n not in wanted}
        if not any(weights.values()):
            raise ValueError("with no weight above 0 nobody would be served")
        self.weights = {name: float(weight) for name, weight in weights.items()}

    async def check(self, replica: Replica) -> None:
        try:
            answer = await self.client.get(replica.url + "/health", timeout=2.0)
            replica.up = answer.status_code == 200
        except httpx.RequestError:
            replica.up = False

    def watch(self) -> None:
        """Begin to ask every replica how it is, each at its own pace: one that hangs delays none."""
        self.watchers = [asyncio.create_task(self.keep_checking(r)) for r in self.replicas]

    async def keep_checking(self, replica: Replica) -> None:
        while True:
            await self.check(replica)
            await asyncio.sleep(self.check_every_s)


def share_at(point: float, shares: dict[str, float]) -> tuple[str, float]:
    """Whose share a point in [0, 1) falls into, and where in that share: in [0, 1) too."""
    left = point * sum(shares.values())
    for name, share in shares.items():
        if left < share:
            return name, left / share
        left -= share
    return name, 0.0  # by rounding


def point_of(user: object, rollout: str) -> float:
    """Where in [0, 1) a request falls: anywhere without a user, and for one always the same place.

    In another rollout it is another place, so that not the same users meet each new version first.
    """
    if not isinstance(user, str) or not user:
        return random.random()
    digest = hashlib.sha256(f"{rollout}\0{user}".encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


# --- server-sent events ---------------------------------------------------------------------------


async def events(response: httpx.Response, deadline: float) -> AsyncIterator[bytes]:
    """Each event of a stream as soon as it is whole, up to [DONE]; half an event is never passed on.

    TimeoutError when the deadline (of time.monotonic()) has passed.
    """
    waiting = b""
    parts = response.aiter_raw()
    while True:
        with anyio.fail_after(deadline - time.monotonic()):
            part = await anext(parts, None)
        if part is None:
            return
        *whole, waiting = EVENT_END.split(waiting + part)
        for event in whole:
            yield event + b"\n\n"
            if is_done(event):  # the rest is nobody's: a comment, or nothing
                with anyio.move_on_after(END_S), contextlib.suppress(httpx.RequestError):
                    async for _ in parts:
                        pass
                return


async def until_first_token(stream: AsyncIterator[bytes]) -> list[bytes]:
    """The events up to the first that carries something generated, that one included."""
    head = []
    async for event in stream:
        head.append(event)
        if is_done(event) or carries_token(event):
            return head
    raise Failed("the stream ended before its first token")


def data_of(event: bytes) -> bytes:
    return b"".join(line[5:] for line in event.splitlines() if line.startswith(b"data:"))


def is_done(event: bytes) -> bool:
    return data_of(event).strip() == b"[DONE]"


def is_aborted(data: bytes) -> bool:
    """Whether vLLM has given up a request: it does so when it is stopped without draining."""
    if b'"abort"' in data:
        with contextlib.suppress(*MALFORMED):
            choices = json.loads(data)["choices"]
            return any(choice.get("finish_reason") == "abort" for choice in choices)
    return False


def carries_token(event: bytes) -> bool:
    """Whether an event has generated content: a role alone, a comment or a heartbeat has none."""
    data = data_of(event)
    if is_aborted(data):
        raise Failed("aborted before the first token")
    try:
        content = json.loads(data or b"{}")
        if content.get("error"):
            raise Failed("an error in place of the first token")
        return any(is_generated(choice) for choice in content.get("choices") or [])
    except MALFORMED:
        raise Failed("an event that is none of OpenAI's") from None


def is_generated(choice: dict) -> bool:
    delta = choice.get("delta") or {}
    generated = any(value for key, value in delta.items() if key != "role")
    return bool(generated or any(choice.get(k) for k in ("text", "token_ids", "finish_reason")))
