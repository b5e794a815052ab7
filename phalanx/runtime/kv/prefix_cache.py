"""Block tables of sequences, and the reuse of blocks that another sequence has already computed.

Life of a table:   Table -> match -> admit -> (append, commit)* -> free -> match -> admit -> ... (preempted) or gone

    tokens      |=============================================|......          known tokens, grows by append
    blocks      [ sealed ][ sealed ][ sealed ][ open  ][ open  ][ open  ]      capacity = all of them
                 hits of admit ^     ^ commit                  ^ append

Open blocks belong to one table alone; sealed ones are final and may be in many tables. A table only ever grows at its
end, so the copies that ranks keep never have to be rewritten.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from phalanx.runtime.kv.hashing import HashCursor, chain
from phalanx.runtime.kv.pool import Block, BlockPool
from phalanx.runtime.kv.spec import KVSpec


class Table:
    """Blocks of one sequence; only `PrefixCache` writes to it. Empty when made and after `free`.

    Made of the sequence's tokens and its namespace (`hashing.root_hash`).

    tokens: the sequence's known token ids, shared with the sequence, which appends to them. Tokens that a `match` has
        seen or a `commit` has sealed must not change.
    cursor: keys of the full blocks, kept over `free` so that resuming hashes nothing twice.
    block_ids, blocks: the blocks in token order, as ids for the ranks and as objects.
    capacity: tokens the blocks hold; while it suffices, `append` has nothing to do.
    num_sealed: leading blocks whose contents are final.
    num_computing: leading blocks that other sequences may wait for, from `num_sealed` on counted in
        `PrefixCache.computing`.
    """

    __slots__ = ("block_ids", "blocks", "capacity", "cursor", "num_computing", "num_sealed", "tokens")

    def __init__(self, tokens: "array[int]", root: bytes) -> None:
        self.tokens = tokens
        self.cursor = HashCursor(root)
        self.block_ids: list[int] = []
        self.blocks: list[Block] = []
        self.capacity = 0
        self.num_sealed = 0
        self.num_computing = 0

    @property
    def root(self) -> bytes:
        """Namespace of the sequence, the parent of its first block's key."""
        return self.cursor.root


class Match(NamedTuple):
    """Leading blocks of a sequence that need no compute; valid until the next `admit`, `append` or `free`."""

    blocks: tuple[Block, ...]
    num_tokens: int


class PrefixCache:
    """KV metadata of one domain's device pool: admission, growth, sealing and release of tables.

    spec: sizes of the pool.
    enabled: False = nothing is hashed, found or kept; allocation is unchanged.
    watermark: fraction of the pool that `admit` leaves free, so that running sequences can grow a while before one of
        them is preempted.
    hits, queries: tokens found and tokens asked for, summed over admissions.
    computing: key -> number of admitted tables that have yet to seal it.
    """

    def __init__(self, spec: KVSpec, *, enabled: bool = True, watermark: float = 0.01) -> None:
        self.spec = spec
        self.enabled = enabled
        self.pool = BlockPool(spec.num_blocks)
        self.watermark_blocks = int(watermark * (spec.num_blocks - 1))
        self.hits = 0
        self.queries = 0
        self.computing: dict[bytes, int] = {}
        self._block_size = spec.block_size

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, those with cached contents included."""
        return self.pool.num_free

    @property
    def usage(self) -> float:
        """Share of the pool that tables hold, 0 to 1."""
        return 1.0 - self.pool.num_free / (self.spec.num_blocks - 1)

    def match(self, table: Table) -> Match:
        """Find the leading full blocks of a sequence that is not admitted; changes nothing but the table's hashes.

        The last known token is never part of a match: it must be computed for its logits.
        """
        if not self.enabled:
            return Match((), 0)
        num_tokens = len(table.tokens)
        cursor = table.cursor
        cursor.extend(table.tokens, self._block_size, num_tokens // self._block_size)
        get = self.pool.get
        found: list[Block] = []
        limit = range((num_tokens - 1) // self._block_size)
        for _, h, content in zip(limit, cursor.hashes, cursor.contents, strict=False):
            block = get(h)
            # The contents are compared too, so a key that collides is a miss.
            if block is None or block.tokens != content:
                break
            found.append(block)
        return Match(tuple(found), len(found) * self._block_size)

    def is_computing(self, table: Table, match: Match) -> bool:
        """Whether an admitted sequence is about to seal the first block that `match` lacks: waiting may pay.

        False for a table that was never matched: its hashes are unknown.
        """
        first_missing, hashes = len(match.blocks), table.cursor.hashes
        num_useful = min(len(hashes), (len(table.tokens) - 1) // self._block_size)
        return first_missing < num_useful and hashes[first_missing] in self.computing

    def admit(
        self, table: Table, match: Match, num_tokens: int, *, reserve: int = 0, use_watermark: bool = True
    ) -> bool:
        """Give an empty table its hits and new blocks, so that its capacity is at least `num_tokens`.

        Args:
            table: a table without blocks.
            match: what `match` has just returned for this table; an empty one to compute everything anew.
            num_tokens: tokens to hold after the next step, hits included; at least 1.
            reserve: blocks promised to chunked prefills that are already admitted.
            use_watermark: False lets the last free blocks go, as when nothing else runs.

        Returns:
            False if there is no room; nothing has changed then.

        Raises:
            RuntimeError: the table holds blocks, or blocks of the match have changed since.
        """
        hits = match.blocks
        if table.blocks or num_tokens < 1:
            raise RuntimeError(
                f"admit of {num_tokens} tokens to a table of {len(table.blocks)} blocks; want >= 1 and 0"
            )
        if [block.hash for block in hits] != table.cursor.hashes[: len(hits)]:
            raise RuntimeError("admit with an outdated match; call match again after any other admit, append or free")
        num_new = max(0, self.spec.max_blocks(num_tokens) - len(hits))
        # Hits that nobody holds are in the free list too and leave it with the new blocks.
        needed = num_new + sum(block.ref == 0 for block in hits)
        floor = reserve + (self.watermark_blocks if use_watermark else 0)
        if self.pool.num_free - needed < floor:
            return False
        # In this order: allocating first could evict the hits.
        self.pool.acquire(hits)
        new = self.pool.allocate(num_new)
        assert new is not None, "counted above"
        self._extend(table, [*hits, *new])
        if self.enabled:
            table.num_sealed = len(hits)
            table.num_computing = len(table.cursor.hashes)
            for h in table.cursor.hashes[len(hits) :]:
                self.computing[h] = self.computing.get(h, 0) + 1
            self.queries += len(table.tokens)
            self.hits += match.num_tokens
        return True

    def append(self, table: Table, num_tokens: int) -> Sequence[int] | None:
        """Grow an admitted table until its capacity is at least `num_tokens`.

        Returns:
            Ids of the blocks added, `()` if there was room; None if the pool has too few (nothing has changed then).
        """
        if num_tokens <= table.capacity:
            return ()
        if not table.blocks:
            raise RuntimeError("append to a table that is not admitted")
        new = self.pool.allocate(self.spec.max_blocks(num_tokens) - len(table.blocks))
        if new is None:
            return None
        return self._extend(table, new)

    def commit(self, table: Table, num_settled: int) -> None:
        """Seal the blocks that settled tokens fill.

        Args:
            table: an admitted table.
            num_settled: tokens whose KV is written for good. Not those merely scheduled, nor rejected drafts, nor the
                last sampled token (no KV yet): a block sealed early serves garbage to the next sequence.
        """
        num_full = num_settled // self._block_size
        first = table.num_sealed
        if num_full <= first or not self.enabled:
            return
        if num_settled > min(len(table.tokens), table.capacity):
            raise RuntimeError(
                f"commit of {num_settled} tokens to a table that knows {len(table.tokens)} and holds {table.capacity}"
            )
        cursor = table.cursor
        cursor.extend(table.tokens, self._block_size, num_full)
        for i in range(first, num_full):
            self.pool.seal(table.blocks[i], cursor.hashes[i], cursor.contents[i])
        if first < table.num_computing:
            self._uncount(cursor.hashes[first : min(num_full, table.num_computing)])
        table.num_sealed = num_full

    def free(self, table: Table, *, discard: bool = False) -> None:
        """Release all blocks of an admitted table; it can be matched and admitted again (preemption).

        Args:
            table: an admitted table.
            discard: the contents proved bad (NaN): besides the open blocks, which nobody can find anyway, the sealed
                ones and the hits are never found again, so that a retry recomputes what made it fail. Also forgets the
                hashes, so the tokens may be replaced.

        Raises:
            RuntimeError: the table holds no blocks (a second call).
        """
        if not table.blocks:
            raise RuntimeError("free of a table that holds no blocks: it was freed before or never admitted")
        self._uncount(table.cursor.hashes[table.num_sealed : table.num_computing])
        if discard:
            for block in table.blocks:
                self.pool.unseal(block)
            table.cursor.clear()
        # Last block first: it is evicted first, and a shorter prefix stays useful.
        self.pool.release(table.blocks[::-1])
        table.blocks = []
        table.block_ids = []
        table.capacity = table.num_sealed = table.num_computing = 0

    def _extend(self, table: Table, blocks: list[Block]) -> list[int]:
        block_ids = [block.id for block in blocks]
        table.blocks += blocks
        table.block_ids += block_ids
        table.capacity = len(table.blocks) * self._block_size
        return block_ids

    def _uncount(self, hashes: list[bytes]) -> None:
        for h in hashes:
            self.computing[h] -= 1
            if not self.computing[h]:
                del self.computing[h]

    def check(self, tables: Iterable[Table] | None = None) -> None:
        """Assert every invariant; O(blocks), with `tables` also O(their tokens).

        Args:
            tables: all admitted tables, if reference counts and contents are to be checked against them.
        """
        self.pool.check()
        assert all(count > 0 for count in self.computing.values()), "a computing count is not positive"
        assert self.hits <= self.queries, "more hits than queries"
        if tables is None:
            return
        refs: Counter[Block] = Counter()
        computing: Counter[bytes] = Counter()
        for table in tables:
            self._check_table(table)
            refs.update(table.blocks)
            computing.update(table.cursor.hashes[table.num_sealed : table.num_computing])
        for block in self.pool.blocks:
            assert block.ref == refs[block], f"{block} is in {refs[block]} tables"
        assert self.computing == computing, "computing counts differ from the tables"

    def _check_table(self, table: Table) -> None:
        assert table.block_ids == [block.id for block in table.blocks], "block_ids differ from blocks"
        assert len(set(table.block_ids)) == len(table.block_ids), f"a block twice in {table.block_ids}"
        assert 0 not in table.block_ids, "the null block is in a table"
        assert table.capacity == len(table.blocks) * self._block_size, f"capacity is {table.capacity}"
        assert table.num_sealed <= len(table.blocks), f"{table.num_sealed} of {len(table.blocks)} blocks sealed"
        cursor, stride = table.cursor, self._block_size * table.tokens.itemsize
        data, parent = table.tokens.tobytes(), table.root
        for i, (h, content) in enumerate(zip(cursor.hashes, cursor.contents, strict=True)):
            assert content == data[i * stride : (i + 1) * stride], f"tokens of hashed block {i} have changed"
            parent = chain(parent, content)
            assert h == parent, f"hash {i} is not the chain of the tokens"
        for i, block in enumerate(table.blocks):
            if i >= table.num_sealed:
                assert block.hash is None, f"{block} is open and has contents"
                assert block.ref == 1, f"{block} is open and shared"
            elif block.hash is not None:  # None: another table discarded it
                assert (block.hash, block.tokens) == (cursor.hashes[i], cursor.contents[i]), f"{block} is not block {i}"
