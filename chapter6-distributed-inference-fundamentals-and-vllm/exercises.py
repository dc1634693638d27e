"""Chapter 6's exercise. Fill in the class, then grade yourself:

pytest tests/chapter6/test_exercises.py --mine
"""


class BlockManager:
    """Gives each sequence blocks of the KV cache as it grows, and shares them where it may.

    The cache is `blocks` blocks, numbered from 0, of `block_size` tokens each. A sequence's block
    table lists its blocks in order: token i stands in block table[i // block_size], at the place
    i % block_size. A block may be in the tables of several sequences; it is free when it is in
    none. Nothing here knows what the tokens are.
    """

    def __init__(self, blocks: int, block_size: int):
        """All blocks are free."""
        raise NotImplementedError

    def allocate(self, sequence: int, tokens: int) -> list[int]:
        """Give a new sequence blocks for its prompt, and return its table.

        No block more than the tokens need. Raises MemoryError if too few are free, and ValueError
        if the sequence has a table already or `tokens` is below 1; then nothing has changed.
        """
        raise NotImplementedError

    def append(self, sequence: int) -> tuple[int, int] | None:
        """Make room for one more token, which the caller will now write into the last block.

        A full last block is followed by a new one. A last block that another sequence has too may
        not be written to: it is replaced by a new one in this sequence's table, and the two
        numbers are returned as (from, to), for the caller to copy (copy on write). Else None.

        Raises MemoryError if a block is needed and none is free, KeyError for an unknown
        sequence; then nothing has changed. Takes constant time, however long the sequence is.
        """
        raise NotImplementedError

    def fork(self, parent: int, child: int) -> None:
        """Let a new sequence go on from where the parent is now, with the same blocks.

        Takes no block. Raises KeyError for an unknown parent, ValueError for a known child.
        """
        raise NotImplementedError

    def free(self, sequence: int) -> None:
        """Forget a sequence; its blocks that no other has become free. KeyError if unknown."""
        raise NotImplementedError

    def table(self, sequence: int) -> list[int]:
        """The blocks of a sequence, in order."""
        raise NotImplementedError

    def free_blocks(self) -> int:
        """How many blocks are free; in constant time."""
        raise NotImplementedError
