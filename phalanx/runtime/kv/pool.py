"""Blocks of one tier: reference counts, the free list in eviction order, and the index from key to block.

Nothing here knows which tier it serves, what a sequence is, or what a block's bytes look like; another tier is the same
class with another size. Single-threaded; every call is O(blocks it touches).
"""

from collections.abc import Callable, Iterable, Iterator


class Block:
    """One block of a pool, made once; only its `BlockPool` writes to it.

    id: position in the pool's memory.
    gen: how often the block was handed out; a (id, gen) pair names one use of it.
    ref: how many tables and transfers hold it; 0 = in the free list. The index holds no reference.
    hash, tokens: key and token ids (u32 little-endian) of its sealed contents; None and b"" while it has none.
    prev, next: neighbours in the free list; meaningless while ref > 0.
    """

    __slots__ = ("gen", "hash", "id", "next", "prev", "ref", "tokens")

    def __init__(self, block_id: int) -> None:
        self.id = block_id
        self.gen = 0
        self.ref = 0
        self.hash: bytes | None = None
        self.tokens = b""
        self.prev = self.next = self

    def __repr__(self) -> str:
        return f"Block({self.id}, gen={self.gen}, ref={self.ref}, hash={self.hash and self.hash.hex()[:8]})"


class BlockPool:
    """Hands out blocks, takes them back, and finds sealed ones by key.

    A block without references stays findable until it is handed out again, so a cached block *is* a free block. The
    free list is one ring with two sentinels, in eviction order:

        _clean -> blocks without contents, newest first -> _cached -> blocks with contents, oldest first -> (_clean)

    Shadows: when two sequences compute the same block, the second to seal keeps the key but is not indexed. On its last
    release it takes over the index entry if the owner has vanished, else it becomes clean. So tables never change
    under their sequence and the index stays one-to-one.

    Block 0 is the null block: never handed out, never sealed, its references are not counted.
    """

    def __init__(self, num_blocks: int) -> None:
        self.blocks = tuple(Block(i) for i in range(num_blocks))
        self.null = self.blocks[0]
        self.num_free = 0
        self._index: dict[bytes, Block] = {}
        # The dict's own method, because a lookup per block of a long prompt must not pay for a Python call.
        self.get: Callable[[bytes], Block | None] = self._index.get
        self._clean, self._cached = Block(-1), Block(-2)
        self._clean.next = self._clean.prev = self._cached
        self._cached.next = self._cached.prev = self._clean
        for block in self.blocks[1:]:
            block.ref = 1
        self.release(self.blocks[:0:-1])

    def allocate(self, n: int) -> list[Block] | None:
        """Take `n` blocks from the front of the free list, each with one reference; None and no change if too few.

        This is the only place where cached contents are evicted.
        """
        if n > self.num_free:
            return None
        taken: list[Block] = []
        cached = self._cached
        front = self._clean
        block = front.next
        num_clean = n
        for i in range(n):
            if block is cached:  # no clean block is left: the sentinel moves up and eviction starts behind it
                num_clean = i
                front.next, cached.prev = cached, front
                front, block = cached, cached.next
            block.gen += 1
            block.ref = 1
            taken.append(block)
            block = block.next
        front.next, block.prev = block, front
        self.num_free -= n
        # Unindexed before they are handed out: an entry that outlives its contents is a wrong hit.
        self._remove(taken[num_clean:])
        return taken

    def acquire(self, blocks: Iterable[Block]) -> None:
        """Add one reference to each block; a cached one leaves the free list with its contents.

        Raises:
            RuntimeError: a free block without contents; only `allocate` may hand it out.
        """
        for block in blocks:
            if block.ref == 0:
                if block.hash is None:
                    raise RuntimeError(f"acquire of {block}, which is free and has no contents")
                block.prev.next, block.next.prev = block.next, block.prev
                self.num_free -= 1
            block.ref += 1

    def release(self, blocks: Iterable[Block], *, cold: bool = False) -> None:
        """Drop one reference of each block; the order given is the order in which they will be evicted.

        Args:
            blocks: a sequence's blocks go last one first, because a tail is useless without its head.
            cold: evict these before every other cached block (their contents live on in another tier).

        Raises:
            RuntimeError: a block without references; whoever released it twice would share it with the next owner.
        """
        clean, coldest, owner_of = self._clean, self._cached, self.get
        num_freed = 0
        for block in blocks:
            if block.ref != 1:
                if block.ref < 1:
                    raise RuntimeError(f"release of {block}, which nobody holds")
                block.ref -= 1
                continue
            block.ref = 0
            num_freed += 1
            if block.hash is not None and owner_of(block.hash) is not block:
                self._settle_shadow(block.hash, block)
            if block.hash is None:
                before = clean
            elif cold:
                before = coldest
                coldest = block
            else:
                before = clean.prev  # the ring closes here: the most recent cached block
            after = before.next
            block.prev, block.next = before, after
            before.next = after.prev = block
        self.num_free += num_freed

    def seal(self, block: Block, h: bytes, tokens: bytes) -> bool:
        """Declare a held block's contents final and findable as `h`.

        Returns:
            False if another block already owns `h`; this one then is a shadow.

        Raises:
            RuntimeError: the block is free, sealed already, or the null block.
        """
        if block.ref < 1 or block.hash is not None:
            raise RuntimeError(f"seal of {block}, which is not a held block without contents")
        block.hash = h
        block.tokens = tokens
        if h in self._index:
            return False
        self._insert(h, block)
        return True

    def unseal(self, block: Block) -> None:
        """Drop a held block's key, so that its contents are never found again (they proved bad)."""
        if block.hash is not None and self._index.get(block.hash) is block:
            self._remove([block])
        block.hash = None
        block.tokens = b""

    def reset(self) -> None:
        """Forget all contents, for example because the weights changed.

        Raises:
            RuntimeError: somebody still holds a block.
        """
        if self.num_free != len(self.blocks) - 1:
            raise RuntimeError(f"reset of a pool with {len(self.blocks) - 1 - self.num_free} blocks in use; free first")
        everything = self.allocate(self.num_free) or []
        self.release(sorted(everything, key=lambda block: block.id, reverse=True))

    def free_order(self) -> Iterator[Block]:
        """Free blocks in the order in which `allocate` takes them."""
        block = self._clean.next
        while block is not self._clean:
            if block is not self._cached:
                yield block
            block = block.next

    # The only two writers of the index: `stored` and `removed` events belong here.
    def _insert(self, h: bytes, block: Block) -> None:
        self._index[h] = block

    def _remove(self, owners: list[Block]) -> None:
        for block in owners:
            assert block.hash is not None
            del self._index[block.hash]
            block.hash = None
            block.tokens = b""

    def _settle_shadow(self, h: bytes, block: Block) -> None:
        if h in self._index:
            block.hash = None
            block.tokens = b""
        else:
            self._insert(h, block)

    def check(self) -> None:
        """Assert every invariant of the pool; O(blocks)."""
        free: list[Block] = []
        before, block, has_contents = self._clean, self._clean.next, False
        while block is not self._clean:
            assert block.prev is before, f"{block} does not point back to {before}"
            if block is self._cached:
                has_contents = True
            else:
                free.append(block)
                assert len(free) < len(self.blocks), "the free list has a loop"
                assert block.ref == 0, f"{block} is free and held"
                assert (block.hash is not None) == has_contents, f"{block} is in the wrong part of the free list"
                assert block.hash is None or self._index.get(block.hash) is block, f"{block} is cached but not indexed"
            before, block = block, block.next
        assert has_contents, "the free list has lost its sentinel"
        assert self._clean.prev is before, "the free list does not close"
        assert len(free) == len(set(free)) == self.num_free, f"{len(free)} free blocks, num_free is {self.num_free}"
        assert self.null not in free, "the null block is free"
        assert self.null.hash is None, "the null block has contents"
        unheld = sum(block.ref == 0 for block in self.blocks[1:])
        assert unheld == len(free), f"{unheld} blocks without references, {len(free)} free"
        for h, owner in self._index.items():
            assert owner.hash == h, f"index entry {h.hex()[:8]} points to {owner}"
        for block in self.blocks:
            assert (block.hash is None) == (not block.tokens), f"{block} has a key without tokens or the reverse"
