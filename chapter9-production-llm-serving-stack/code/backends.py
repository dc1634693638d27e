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
from collections.abc import AsyncIterator, Collection, Iterator
from dataclasses import dataclass

import httpx

EVENT_END = re.compile(rb"\r?\n\r?\n")
DONE = b"data: [DONE]\n\n"


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
        shares = {n: w for n, w in self.weights.items() if w > 0 and n in names}
        left = point * sum(shares.values())
        chosen = None
        for name, share in shares.items():
            chosen = name
            left -= share
            if left < 0:
                break
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


def point_of(user: object) -> float:
    """Where in [0, 1) a request falls: the same place for the same user, anywhere without one."""
    if not isinstance(user, str) or not user:
        return random.random()
    digest = hashlib.sha256(user.encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


# --- server-sent events ---------------------------------------------------------------------------


async def events(response: httpx.Response) -> AsyncIterator[bytes]:
    """Each event of a stream as soon as it is whole; half an event is never passed on."""
    waiting = b""
    async for part in response.aiter_raw():
        *whole, waiting = EVENT_END.split(waiting + part)
        for event in whole:
            yield event + b"\n\n"


async def until_first_token(stream: AsyncIterator[bytes]) -> list[bytes]:
    """The events up to the first that carries something generated, that one included."""
    head = []
    async for event in stream:
        head.append(event)
        if event == DONE or carries_token(event):
            return head
    raise Failed("the stream ended before its first token")


def carries_token(event: bytes) -> bool:
    """Whether an event has generated content: a role alone, a comment or a heartbeat has none."""
    data = b"".join(line[5:] for line in event.splitlines() if line.startswith(b"data:"))
    try:
        content = json.loads(data or b"{}")
    except ValueError:
        raise Failed("an event that is no JSON") from None
    if not isinstance(content, dict) or content.get("error"):
        raise Failed("an error in place of the first token")
    for choice in content.get("choices") or []:
        if choice.get("finish_reason") == "abort":  # vLLM, when it is stopped without draining
            raise Failed("aborted before the first token")
        delta = choice.get("delta") or {}
        generated = any(value for key, value in delta.items() if key != "role")
        if (
            generated
            or choice.get("text")
            or choice.get("token_ids")
            or choice.get("finish_reason")
        ):
            return True
    return False
