"""Chapter 6's exercise, filled in."""


class BlockManager:
    """Gives each sequence blocks of the KV cache as it grows, and shares them where it may."""

    def __init__(self, blocks: int, block_size: int):
        """All blocks are free."""
        self.block_size = block_size
        self.unused = list(range(blocks))[::-1]
        self.references = [0] * blocks  # tables that a block is in
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def allocate(self, sequence: int, tokens: int) -> list[int]:
        """Give a new sequence blocks for its prompt, and return its table."""
        if sequence in self.tables or tokens < 1:
            raise ValueError(f"sequence {sequence}, {tokens} tokens")
        needed = -(-tokens // self.block_size)
        if needed > len(self.unused):
            raise MemoryError(f"{needed} blocks needed, {len(self.unused)} free")
        self.tables[sequence] = [self._take() for _ in range(needed)]
        self.lengths[sequence] = tokens
        return list(self.tables[sequence])

    def append(self, sequence: int) -> tuple[int, int] | None:
        """Make room for one more token, which the caller will now write into the last block."""
        table = self.tables[sequence]
        full = self.lengths[sequence] % self.block_size == 0
        shared = self.references[table[-1]] > 1
        if (full or shared) and not self.unused:
            raise MemoryError("no block is free")
        self.lengths[sequence] += 1
        if full:
            table.append(self._take())
        elif shared:
            old = table[-1]
            self.references[old] -= 1
            table[-1] = self._take()
            return old, table[-1]
        return None

    def fork(self, parent: int, child: int) -> None:
        """Let a new sequence go on from where the parent is now, with the same blocks."""
        table = self.tables[parent]
        if child in self.tables:
            raise ValueError(f"sequence {child} is known")
        self.tables[child] = list(table)
        self.lengths[child] = self.lengths[parent]
        for block in table:
            self.references[block] += 1

    def free(self, sequence: int) -> None:
        """Forget a sequence; its blocks that no other has become free. KeyError if unknown."""
        for block in self.tables.pop(sequence):
            self.references[block] -= 1
            if not self.references[block]:
                self.unused.append(block)
        del self.lengths[sequence]

    def table(self, sequence: int) -> list[int]:
        """The blocks of a sequence, in order."""
        return list(self.tables[sequence])

    def free_blocks(self) -> int:
        """How many blocks are free; in constant time."""
        return len(self.unused)

    def _take(self) -> int:
        block = self.unused.pop()
        self.references[block] = 1
        return block
