"""Chapter 7's exercise. Fill in the class, then grade yourself:

pytest tests/chapter7/test_exercises.py --mine
"""

from collections.abc import Sequence


class RadixCache:
    """What RadixAttention keeps of the texts that it has seen: a radix tree with room for so many tokens.

    A token that two sequences share, because they begin alike, is stored once. A node of the tree
    has a run of tokens, not a single one. A call with n tokens hashes and compares at most
    3 * n + 8 of them, however many sequences there are, and adds at most two nodes.

    A token was last used by the last `match` or `insert` that went through it. When room is needed,
    only tokens that no other stored token follows may go, the least recently used of them first, and
    exactly as many as are needed. The tokens of the call itself are never dropped.
    """

    def __init__(self, capacity: int) -> None:
        raise NotImplementedError

    def match(self, tokens: Sequence[int]) -> int:
        """The length of the longest stored prefix of `tokens`; uses it."""
        raise NotImplementedError

    def insert(self, tokens: Sequence[int]) -> int:
        """Store a sequence, or its first `capacity` tokens; the number that had not been there."""
        raise NotImplementedError

    def size(self) -> int:
        """Stored tokens."""
        raise NotImplementedError

    def nodes(self) -> int:
        """Nodes of the tree, without its root."""
        raise NotImplementedError
