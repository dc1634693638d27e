"""Chapter 9's exercise. Fill in the class, then grade yourself:

pytest tests/chapter9/test_exercises.py --mine
"""

from collections.abc import Callable


class TokenBudget:
    """A tenant's budget of model tokens: section 9.4's bucket, for what a request costs.

    A request is worth as many tokens as it may use, and that is known only at its end. So the
    gateway takes prompt and `max_tokens` before it sends the request on, and gives back what the
    answer did not use.

    `rate`: tokens that come in each second, above 0. `capacity`: tokens that the bucket holds, and
    has at first. `clock()`: seconds, from any zero; it may stand still, but never goes back.

    - take(tokens) returns 0.0 if there were as many, and they are taken. Otherwise it takes none,
      and returns the seconds after which there will be as many if nobody else takes any: what
      Retry-After says. Whoever waits that long gets them. More than `capacity` will never be
      there: math.inf. Less than 0 is a ValueError.
    - give_back(tokens) puts tokens back. A bucket never has more than its capacity.
    - Both are exact to a millionth of a token, however often they are called and however short the
      time between.
    - Several threads call at the same time, and none gets what another one has taken.
    - A call costs the same whatever was before it and however long ago. No thread or timer of its
      own, and no memory that grows.
    """

    def __init__(self, rate: float, capacity: float, clock: Callable[[], float]):
        raise NotImplementedError

    def take(self, tokens: float) -> float:
        """0.0 if the tokens are taken, or else the seconds until there are as many."""
        raise NotImplementedError

    def give_back(self, tokens: float) -> None:
        """Put back what a request did not use."""
        raise NotImplementedError
