"""Who may ask, and how often: API keys that are stored as hashes, and a token bucket for each tenant.

A module of ch09_api_gateway.py. Section 9.4.
"""

import argparse
import hashlib
import hmac
import math
import re
import time
from collections.abc import Callable


def sha256_hex(key: str) -> str:
    """What is stored of a key. A key is random, not a password, so a fast hash is enough."""
    return hashlib.sha256(key.encode()).hexdigest()


def tenant_of(authorization: str, hashes: dict[str, str]) -> str | None:
    """The tenant whose key an `Authorization: Bearer KEY` header carries.

    Every stored hash is compared, in constant time, so that how long it takes says nothing.
    """
    scheme, _, key = authorization.partition(" ")
    digest = sha256_hex(key.strip())
    found = None
    for tenant, known in hashes.items():
        if hmac.compare_digest(digest, known):
            found = tenant
    return found if scheme.lower() == "bearer" else None


class TokenBucket:
    """`burst` requests at once, and `per_second` in the long run."""

    def __init__(
        self, burst: float, per_second: float, clock: Callable[[], float] = time.monotonic
    ):
        self.burst = burst
        self.per_second = per_second
        self.clock = clock
        self.tokens = burst
        self.seen_s = clock()

    def take(self) -> float:
        """Take a token and return 0, or return the seconds until there is one.

        No `await` stands between looking and taking, so on one event loop nobody comes between.
        """
        now = self.clock()
        self.tokens = min(self.burst, self.tokens + (now - self.seen_s) * self.per_second)
        self.seen_s = now
        if self.tokens >= 1 - 1e-9:  # what rounding may take from a token that is due
            self.tokens -= 1
            return 0.0
        return (1 - self.tokens) / self.per_second if self.per_second else 3600.0


# --- the gateway's flags ----------------------------------------------------------------------------


def pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not re.fullmatch(r"[\w.-]+", name) or not equals or not value:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    return name, value


def hashed(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError("want the key's SHA-256, 64 hexadecimal digits")
    return text


def key_of_tenant(text: str) -> tuple[str, str]:
    tenant, digest = pair(text)
    return tenant, hashed(digest)


def limit_of_tenant(text: str) -> tuple[str, tuple[float, float]]:
    tenant, limit = pair(text)
    burst, per_second = (float(number) for number in limit.split(","))
    if not (1 <= burst < math.inf and 0 <= per_second < math.inf):
        raise argparse.ArgumentTypeError("want a burst of 1 or more, and a rate of 0 or more")
    return tenant, (burst, per_second)
