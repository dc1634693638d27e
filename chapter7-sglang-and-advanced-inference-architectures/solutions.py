"""Chapter 7's exercise, filled in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class _Node:
    tokens: tuple[int, ...]
    parent: _Node | None
    last_use: int
    children: dict[int, _Node] = field(default_factory=dict)  # by their first token


class RadixCache:
    """A radix tree with room for so many tokens, which drops the least recently used ends."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._root = _Node((), None, 0)
        self._size = 0
        self._clock = 0

    def match(self, tokens: Sequence[int]) -> int:
        """The length of the longest stored prefix of `tokens`; uses it."""
        return self._walk(tokens)[1]

    def insert(self, tokens: Sequence[int]) -> int:
        """Store a sequence, or its first `capacity` tokens; the number that had not been there."""
        tokens = tuple(tokens[: self._capacity])
        node, found = self._walk(tokens)
        new = tokens[found:]
        if new:
            self._make_room(len(new))
            node.children[new[0]] = _Node(new, node, self._clock)
            self._size += len(new)
        return len(new)

    def size(self) -> int:
        """Stored tokens."""
        return self._size

    def nodes(self) -> int:
        """Nodes of the tree, without its root."""
        return sum(1 for _ in self._all()) - 1

    def _walk(self, tokens: Sequence[int]) -> tuple[_Node, int]:
        """The node that the longest stored prefix ends with, cut off there, and its length."""
        self._clock += 1
        node, found = self._root, 0
        while found < len(tokens) and (child := node.children.get(tokens[found])):
            common = 1  # the first token is the key by which it was found
            while (
                common < len(child.tokens)
                and found + common < len(tokens)
                and child.tokens[common] == tokens[found + common]
            ):
                common += 1
            if common < len(child.tokens):
                child = self._split(child, common)
            child.last_use = self._clock
            node, found = child, found + common
        return node, found

    def _split(self, node: _Node, length: int) -> _Node:
        """A new node for the first `length` tokens, above what is left of the old one."""
        assert node.parent is not None
        upper = _Node(node.tokens[:length], node.parent, node.last_use)
        node.parent.children[upper.tokens[0]] = upper
        node.tokens = node.tokens[length:]
        node.parent = upper
        upper.children[node.tokens[0]] = node
        return upper

    def _make_room(self, count: int) -> None:
        while (excess := self._size + count - self._capacity) > 0:
            leaves = (node for node in self._all() if not node.children and node.parent)
            leaf = min(leaves, key=lambda node: node.last_use)
            dropped = min(excess, len(leaf.tokens))
            if dropped == len(leaf.tokens):
                assert leaf.parent is not None
                del leaf.parent.children[leaf.tokens[0]]
            leaf.tokens = leaf.tokens[: len(leaf.tokens) - dropped]
            self._size -= dropped

    def _all(self) -> Iterator[_Node]:
        waiting = [self._root]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()
