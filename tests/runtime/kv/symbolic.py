"""The KV metadata on a symbolic device: every slot holds a tag that says which token prefix its KV belongs to.

A step writes tags for the tokens it computes and reads every slot its table exposes; one wrong tag shows a wrong hit,
an early seal, a use after free or a mixed-up table, whatever caused it. Tags are nodes of a trie over (namespace,
tokens), so they share nothing with the hash chain under test. Launched steps run first in, first out, as on one compute
stream; those of a sequence that is gone still write, and write rubbish.

`World` plays the scheduler. Its operations take arbitrary integers, so that Hypothesis and a seeded `random.Random`
can drive it alike; it checks all invariants after each of them.
"""

import random
from array import array
from collections import deque
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from phalanx.runtime.kv import hashing, pool, prefix_cache, spec

REAL = SimpleNamespace(hashing=hashing, pool=pool, prefix_cache=prefix_cache, spec=spec)
RUBBISH = -1
MAX_IN_FLIGHT = 4


class Sequence:
    """A request as the scheduler sees it. `life` counts how often it lost its blocks; older steps are stale."""

    def __init__(self, table_class: type, namespace: int, root: bytes, tokens: list[int]) -> None:
        self.namespace = namespace
        self.tokens = array("I", tokens)
        self.table = table_class(self.tokens, root)
        self.nodes: list[int] = []
        self.life = 0
        self.num_launched = self.num_settled = self.num_known_at_admit = 0


class Step(NamedTuple):
    """Compute tokens [start, end); the slots [end, end + num_drafts) receive drafts that will be rejected."""

    sequence: Sequence
    life: int
    block_ids: tuple[int, ...]
    start: int
    end: int
    num_drafts: int


class World:
    def __init__(
        self,
        kv: SimpleNamespace | ModuleType = REAL,
        *,
        block_size: int = 2,
        num_blocks: int = 12,
        max_model_len: int = 12,
        watermark: float = 0.0,
        enabled: bool = True,
    ) -> None:
        self.kv = kv
        self.spec = kv.spec.KVSpec(block_size=block_size, num_blocks=num_blocks, max_model_len=max_model_len)
        self.cache = kv.prefix_cache.PrefixCache(self.spec, enabled=enabled, watermark=watermark)
        self.roots = [kv.hashing.root_hash({"model": "m", "tenant": name}) for name in "ab"]
        self.slots = [RUBBISH] * (num_blocks * block_size)
        self.trie: dict[tuple[int, int], int] = {}
        self.gens = [block.gen for block in self.cache.pool.blocks]
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.in_flight: deque[Step] = deque()
        self.num_finished = 0

    # operations

    def add(self, namespace: int, document: int, length: int, tail: int) -> None:
        """A request that starts with a piece of one of a few documents, so that prefixes are shared often."""
        length = 1 + length % (self.spec.max_model_len - 1)
        text = random.Random(document % 3).choices(range(2), k=length)
        if tail % 2:
            text[-1 - tail % length :] = random.Random(tail).choices(range(2), k=1 + tail % length)
        namespace %= len(self.roots)
        self.waiting.append(Sequence(self.kv.prefix_cache.Table, namespace, self.roots[namespace], text))

    def admit(self, which: int, chunk: int, reserve: int, use_watermark: bool, use_hits: bool = True) -> bool:
        if not self.waiting:
            return False
        sequence = self.waiting[which % len(self.waiting)]
        table, before = sequence.table, self.snapshot()
        match = self.cache.match(table)
        assert self.cache.match(table) == match, "match depends on having been called"
        assert match.num_tokens == len(match.blocks) * self.spec.block_size < len(sequence.tokens)
        self._read(sequence, [block.id for block in match.blocks], match.num_tokens)
        assert self.cache.is_computing(table, match) == self._is_computing(sequence, len(match.blocks))
        assert self.snapshot() == before, "match or is_computing changed something"
        if not use_hits:
            match = self.kv.prefix_cache.Match((), 0)
        num_tokens = min(len(sequence.tokens), match.num_tokens + 1 + chunk)
        floor = reserve + (self.cache.watermark_blocks if use_watermark else 0)
        idle = sum(block.ref == 0 for block in match.blocks)
        remaining = self.cache.num_free - idle - (self.spec.max_blocks(num_tokens) - len(match.blocks))
        admitted = self.cache.admit(table, match, num_tokens, reserve=reserve, use_watermark=use_watermark)
        assert admitted == (remaining >= floor), f"admitted is {admitted}, {remaining} blocks remain, floor {floor}"
        if not admitted:
            assert self.snapshot() == before, "a refused admission changed something"
            return False
        assert self.cache.num_free == remaining
        assert table.capacity >= num_tokens
        assert table.block_ids[: len(match.blocks)] == [block.id for block in match.blocks], "hits lost on admission"
        self._note_new(table.blocks[len(match.blocks) :])
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.num_launched = sequence.num_settled = match.num_tokens
        sequence.num_known_at_admit = len(sequence.tokens)
        return True

    def launch(self, which: int, num_tokens: int, num_drafts: int) -> None:
        """Launch a prefill chunk, or one decode step ahead of the results; preempt when the pool is full."""
        if not self.running or len(self.in_flight) >= MAX_IN_FLIGHT:
            return
        sequence = self.running[which % len(self.running)]
        table, start = sequence.table, sequence.num_launched
        end = min(start + 1 + num_tokens, max(len(sequence.tokens), start + 1))
        if end > min(len(sequence.tokens) + self._num_samples_to_come(sequence), self.spec.max_model_len):
            return
        num_drafts = min(num_drafts, self.spec.max_model_len - end)
        before, old_capacity, old_len = self.snapshot(), table.capacity, len(table.blocks)
        new = self.cache.append(table, end + num_drafts)
        if new is None:
            assert self.snapshot() == before, "a refused append changed something"
            assert self.cache.num_free < self.spec.max_blocks(end + num_drafts) - old_len, "append refused without need"
            self.preempt(-1)
            return
        assert (len(new) == 0) == (end + num_drafts <= old_capacity)
        assert list(new) == table.block_ids[old_len:]
        assert table.capacity >= end + num_drafts
        self._note_new(table.blocks[old_len:])
        self.in_flight.append(Step(sequence, sequence.life, tuple(table.block_ids), start, end, num_drafts))
        sequence.num_launched = end
        self.on_launch(sequence)

    def on_launch(self, sequence: Sequence) -> None:
        """Where a careless scheduler would commit."""

    def execute(self, sampled: int, fails: bool = False) -> None:
        """Run the oldest launched step; if it `fails`, its row was NaN and nothing of the sequence can be trusted."""
        if not self.in_flight:
            return
        sequence, life, block_ids, start, end, num_drafts = self.in_flight.popleft()
        is_stale = life != sequence.life
        for position in range(start, end + num_drafts):
            is_rubbish = is_stale or fails or position >= end
            tag = RUBBISH if is_rubbish else self._node(sequence, position)
            self.slots[self._slot(block_ids, position)] = tag
        if is_stale:
            return
        if fails:
            self._discard(sequence)
            return
        self._read(sequence, block_ids, end)
        self.cache.commit(sequence.table, end)
        sequence.num_settled = end
        if end == len(sequence.tokens):
            if end < self.spec.max_model_len:
                sequence.tokens.append(sampled % 2)
            else:
                self._finish(sequence)

    def finish(self, which: int) -> None:
        """End a running sequence, whatever it has in flight (an abort is the same)."""
        if self.running:
            self._finish(self.running[which % len(self.running)])

    def preempt(self, which: int) -> None:
        if self.running:
            sequence = self.running[which % len(self.running)]
            self._free(sequence)
            self.waiting.append(sequence)

    def drain(self) -> None:
        """Run everything to its end. Some request must always make progress, and nothing may be left behind."""
        for _ in range(10_000):
            if self.in_flight:
                self.execute(0)
            elif self.running:
                before = len(self.running)
                self.launch(0, self.spec.max_model_len, 0)
                assert self.in_flight or 1 < before > len(self.running), "no progress"
            elif self.waiting:
                assert self.admit(0, self.spec.max_model_len, 0, False), "an empty pool refuses a request"
            else:
                break
        assert not self.running, "no end"
        self.check()
        assert self.cache.num_free == self.spec.num_blocks - 1
        assert all(block.ref == 0 for block in self.cache.pool.blocks)
        assert not self.cache.computing

    # oracles

    def check(self) -> None:
        self.cache.check([sequence.table for sequence in self.running])
        for sequence in self.waiting:
            table = sequence.table
            assert not table.blocks
            assert not table.block_ids
            assert table.capacity == table.num_sealed == table.num_computing == 0
        for sequence in self.running:
            expected = sequence.num_settled // self.spec.block_size if self.cache.enabled else 0
            assert sequence.table.num_sealed == expected, f"{sequence.table.num_sealed} sealed, want {expected}"

    def snapshot(self) -> dict[str, Any]:
        """Everything the cache and its tables hold, except hashes remembered by `match`."""
        cache, blocks = self.cache, self.cache.pool.blocks
        return {
            "blocks": [(block.gen, block.ref, block.hash, block.tokens) for block in blocks],
            "free": [block.id for block in cache.pool.free_order()],
            "found": [block.hash is not None and cache.pool.get(block.hash) is block for block in blocks],
            "computing": dict(cache.computing),
            "counters": (cache.hits, cache.queries, cache.num_free),
            "tables": [
                (tuple(t.block_ids), t.capacity, t.num_sealed, t.num_computing)
                for t in (sequence.table for sequence in self.waiting + self.running)
            ],
        }

    def _read(self, sequence: Sequence, block_ids: Any, num_tokens: int) -> None:
        for position in range(num_tokens):
            tag, expected = self.slots[self._slot(block_ids, position)], self._node(sequence, position)
            assert tag == expected, f"position {position} of {list(sequence.tokens)} reads tag {tag}, want {expected}"

    def _slot(self, block_ids: Any, position: int) -> int:
        block, offset = divmod(position, self.spec.block_size)
        return int(block_ids[block]) * self.spec.block_size + offset

    def _node(self, sequence: Sequence, position: int) -> int:
        nodes = sequence.nodes
        while len(nodes) <= position:
            edge = (nodes[-1] if nodes else -2 - sequence.namespace, sequence.tokens[len(nodes)])
            nodes.append(self.trie.setdefault(edge, len(self.trie)))
        return nodes[position]

    def _is_computing(self, sequence: Sequence, block: int) -> bool:
        last = (block + 1) * self.spec.block_size - 1
        if not self.cache.enabled or last + 1 >= len(sequence.tokens):
            return False
        return any(
            other.num_settled <= last < other.num_known_at_admit
            and self._node(other, last) == self._node(sequence, last)
            for other in self.running
        )

    def _num_samples_to_come(self, sequence: Sequence) -> int:
        return sum(
            step.sequence is sequence and step.life == sequence.life and step.end >= len(sequence.tokens)
            for step in self.in_flight
        )

    def _note_new(self, blocks: list[Any]) -> None:
        for block in blocks:
            assert block.gen > self.gens[block.id], f"{block} was handed out again under its old gen"
            self.gens[block.id] = block.gen
            self._spoil(block)

    def _spoil(self, block: Any) -> None:
        first = block.id * self.spec.block_size
        self.slots[first : first + self.spec.block_size] = [RUBBISH] * self.spec.block_size

    def _free(self, sequence: Sequence, *, discard: bool = False) -> None:
        table = sequence.table
        blocks, was_shared_bad = table.blocks, any(b.hash is None for b in table.blocks[: table.num_sealed])
        num_sealed = table.num_sealed
        self.cache.free(table, discard=discard)
        self.running.remove(sequence)
        sequence.life += 1
        sequence.num_launched = sequence.num_settled = 0
        order = {block: i for i, block in enumerate(self.cache.pool.free_order())}
        cached = [order[block] for block in blocks if block.ref == 0 and block.hash is not None]
        assert cached == sorted(cached, reverse=True), "a head would be evicted before its tail"
        match = self.cache.match(table)
        if discard:
            assert not set(match.blocks) & set(blocks), "discarded contents are found"
        elif not was_shared_bad:
            expected = min(num_sealed, (len(sequence.tokens) - 1) // self.spec.block_size)
            assert len(match.blocks) >= expected, "sealed contents are not found after free"

    def _finish(self, sequence: Sequence) -> None:
        self._free(sequence)
        self.num_finished += 1

    def _discard(self, sequence: Sequence) -> None:
        for block in sequence.table.blocks:
            if block.ref == 1:
                self._spoil(block)
        self._free(sequence, discard=True)
        self.waiting.append(sequence)


OPERATIONS = ("add", "admit", "launch", "execute", "finish", "preempt", "fail")
WEIGHTS = (3, 6, 16, 14, 2, 1, 1)
MAX_SEQUENCES = 8


def random_operation(world: World, rng: random.Random) -> None:
    match rng.choices(OPERATIONS, WEIGHTS)[0]:
        case "add" if len(world.waiting) + len(world.running) < MAX_SEQUENCES:
            world.add(rng.randrange(8) // 7, rng.randrange(3), rng.randrange(100), rng.randrange(40))
        case "admit":
            reserve, use_watermark, use_hits = rng.choice((0, 0, 0, 2)), rng.random() < 0.7, rng.random() < 0.95
            world.admit(rng.randrange(8), rng.randrange(12), reserve, use_watermark, use_hits)
        case "launch":
            world.launch(rng.randrange(8), rng.choice((0, 2, 12)), rng.choice((0, 0, 0, 1, 3)))
        case "execute":
            world.execute(rng.randrange(2))
        case "finish":
            world.finish(rng.randrange(8))
        case "preempt":
            world.preempt(rng.randrange(8))
        case "fail":
            world.execute(0, fails=True)
    world.check()


CONFIGS: tuple[dict[str, Any], ...] = (
    {"block_size": 1, "num_blocks": 9, "max_model_len": 8},
    {"block_size": 2, "num_blocks": 8, "max_model_len": 13},
    {"block_size": 2, "num_blocks": 24, "max_model_len": 16, "watermark": 0.1},
    {"block_size": 4, "num_blocks": 16, "max_model_len": 30, "watermark": 0.2},
    {"block_size": 4, "num_blocks": 40, "max_model_len": 37},
)


def drive(world: World, seed: int, num_steps: int) -> None:
    """Seeded random operations, then drain."""
    rng = random.Random(seed)
    for _ in range(num_steps):
        random_operation(world, rng)
    world.drain()
