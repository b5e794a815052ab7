"""Each guard of the KV metadata is removed once, in the source text; an oracle must notice (about 3 s).

A mutant that survives means that a test proves nothing. A snippet that no longer occurs means that the code has moved:
carry the mutant over to the new text, do not delete it.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest

import phalanx.runtime.kv
from tests.runtime.kv import oracles, reference_pool
from tests.runtime.kv.symbolic import CONFIGS, REAL, Sequence, World, drive

SOURCE = Path(phalanx.runtime.kv.__file__).parent
ORDER = ("spec", "hashing", "pool", "prefix_cache")  # each imports only what stands before it
Oracle = Callable[[SimpleNamespace], None]


def machine(kv: SimpleNamespace, world_class: type[World] = World) -> None:
    for seed, config in enumerate(CONFIGS):
        drive(world_class(kv, **config), seed, num_steps=2500)


def reference(kv: SimpleNamespace) -> None:
    reference_pool.compare(kv, seed=3, num_steps=2000)


class Mutant(NamedTuple):
    name: str
    module: str
    old: str
    new: str
    oracle: Oracle = machine


MUTANTS = (
    # keys
    Mutant("hash without parent", "hashing", "data = parent + tokens", "data = tokens"),
    Mutant("hash without root", "hashing", "if first else self.root", 'if first else b""'),
    Mutant(
        "root without field names", "hashing", "for part in (name.encode(),", 'for part in (b"",', oracles.namespaces
    ),
    Mutant(
        "root without tenant", "hashing", "for name in sorted(fields)", 'for name in sorted(fields.keys() - {"tenant"})'
    ),
    Mutant("cursor rehashes from the root", "hashing", "self.hashes[-1] if first else self.root", "self.root"),
    Mutant(
        "token comparison off, forced collision",
        "prefix_cache",
        "if block is None or block.tokens != content:",
        "if block is None:",
        oracles.collision,
    ),
    # pool
    Mutant("stale hash after eviction", "pool", "self._remove(taken[num_clean:])", "pass"),
    Mutant("one evicted block keeps its hash", "pool", "taken[num_clean:]", "taken[num_clean + 1 :]"),
    Mutant("gen bump skipped", "pool", "block.gen += 1", "pass"),
    Mutant(
        "shadow indexed too",
        "pool",
        "if h in self._index:\n            return False",
        "if False:\n            return False",
    ),
    Mutant("shadow kept un-indexed in the cache", "pool", "and owner_of(block.hash) is not block", "and False"),
    Mutant(
        "shadow never takes over",
        "pool",
        "if h in self._index:\n            block.hash",
        "if True:\n            block.hash",
    ),
    Mutant(
        "second release accepted",
        "pool",
        "if block.ref < 1:\n                    raise",
        "if False:\n                    raise",
        oracles.second_release,
    ),
    Mutant("cold blocks to the back", "pool", "elif cold:", "elif False:", reference),
    Mutant("cold blocks in reverse", "pool", "coldest = block\n", "pass\n", reference),
    Mutant("clean blocks to the back", "pool", "before = clean\n", "before = self._cached.prev\n", reference),
    Mutant("cached blocks to the front", "pool", "before = clean.prev", "before = self._cached", reference),
    Mutant(
        "acquired block stays in the free list",
        "pool",
        "block.prev.next, block.next.prev = block.next, block.prev",
        "pass",
    ),
    Mutant("free count forgets acquired hits", "pool", "self.num_free -= 1", "pass"),
    Mutant(
        "allocate hands out what there is",
        "pool",
        "if n > self.num_free:\n            return None",
        "n = min(n, self.num_free)",
    ),
    Mutant(
        "unseal leaves the index",
        "pool",
        '            self._remove([block])\n        block.hash = None\n        block.tokens = b""',
        "            pass",
    ),
    # tables
    Mutant(
        "partial blocks sealed",
        "prefix_cache",
        "num_full = num_settled // self._block_size",
        "num_full = -(-num_settled // self._block_size)",
    ),
    Mutant(
        "blocks sealed one late",
        "prefix_cache",
        "num_full = num_settled // self._block_size",
        "num_full = (num_settled - 1) // self._block_size",
    ),
    Mutant(
        "last token may be a hit",
        "prefix_cache",
        "range((num_tokens - 1) // self._block_size)",
        "range(num_tokens // self._block_size)",
    ),
    Mutant(
        "match pins its blocks",
        "prefix_cache",
        "return Match(tuple(found)",
        "self.pool.acquire(found)\n        return Match(tuple(found)",
    ),
    Mutant(
        "match counts",
        "prefix_cache",
        "get = self.pool.get\n",
        "get = self.pool.get\n        self.queries += num_tokens\n",
    ),
    Mutant(
        "match goes on behind a miss",
        "prefix_cache",
        "                break\n            found",
        "                continue\n            found",
    ),
    Mutant(
        "one-phase admission",
        "prefix_cache",
        "self.pool.acquire(hits)\n        new = self.pool.allocate(num_new)",
        "new = self.pool.allocate(num_new)\n        self.pool.acquire(hits)",
    ),
    Mutant("evictable hits not counted", "prefix_cache", "num_new + sum(block.ref == 0 for block in hits)", "num_new"),
    Mutant("watermark ignored", "prefix_cache", "reserve + (self.watermark_blocks if use_watermark else 0)", "reserve"),
    Mutant("reserve ignored", "prefix_cache", "reserve + (self", "0 + (self"),
    Mutant(
        "refused admission counts",
        "prefix_cache",
        "if self.pool.num_free - needed < floor:",
        "self.queries += 1\n        if self.pool.num_free - needed < floor:",
    ),
    Mutant("hits not counted as sealed", "prefix_cache", "table.num_sealed = len(hits)", "table.num_sealed = 0"),
    Mutant(
        "outdated match accepted",
        "prefix_cache",
        "if [block.hash for block in hits] != table.cursor.hashes[: len(hits)]:",
        "if False:",
        oracles.outdated_match,
    ),
    Mutant(
        "computing forgotten on admission", "prefix_cache", "self.computing[h] = self.computing.get(h, 0) + 1", "pass"
    ),
    Mutant("computing not counted twice", "prefix_cache", "self.computing.get(h, 0) + 1", "1"),
    Mutant(
        "computing kept by freed tables",
        "prefix_cache",
        "self._uncount(table.cursor.hashes[table.num_sealed : table.num_computing])",
        "pass",
    ),
    Mutant(
        "block released twice by free",
        "prefix_cache",
        "self.pool.release(table.blocks[::-1])",
        "self.pool.release([*table.blocks, table.blocks[0]])",
    ),
    Mutant(
        "forward-order free", "prefix_cache", "self.pool.release(table.blocks[::-1])", "self.pool.release(table.blocks)"
    ),
    Mutant(
        "one block leaked by free",
        "prefix_cache",
        "self.pool.release(table.blocks[::-1])",
        "self.pool.release(table.blocks[:0:-1])",
    ),
    Mutant(
        "second free accepted",
        "prefix_cache",
        "        table.blocks = []\n        table.block_ids = []\n        table.capacity",
        "        table.capacity",
        oracles.second_free,
    ),
    Mutant(
        "free leaves the sealed count",
        "prefix_cache",
        "table.capacity = table.num_sealed = table.num_computing = 0",
        "table.capacity = table.num_computing = 0",
    ),
    Mutant("discarded contents stay in the cache", "prefix_cache", "self.pool.unseal(block)", "pass"),
    Mutant(
        "sized for one token too few",
        "spec",
        "return -(-num_tokens // self.block_size)",
        "return -(-(num_tokens - 1) // self.block_size)",
    ),
)


def load(mutant: Mutant) -> SimpleNamespace:
    """The four modules from source, one of them damaged, importing each other and not the real ones."""
    modules: dict[str, ModuleType] = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ORDER:
            path = SOURCE / f"{name}.py"
            text = path.read_text()
            if name == mutant.module:
                assert text.count(mutant.old) == 1, f"{mutant.old!r} occurs {text.count(mutant.old)} times in {path}"
                text = text.replace(mutant.old, mutant.new)
            module = ModuleType(f"phalanx.runtime.kv.{name}")
            monkeypatch.setitem(sys.modules, module.__name__, module)
            exec(compile(text, str(path), "exec"), module.__dict__)
            modules[name] = module
    return SimpleNamespace(**modules)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_mutant_dies(mutant: Mutant) -> None:
    kv = load(mutant)
    with pytest.raises((AssertionError, RuntimeError, LookupError, pytest.fail.Exception)):
        mutant.oracle(kv)


def test_undamaged_source_passes_every_oracle() -> None:
    kv = load(Mutant("none", "pool", "class BlockPool:", "class BlockPool:"))
    assert kv.pool.BlockPool is not REAL.pool.BlockPool
    for oracle in {mutant.oracle for mutant in MUTANTS}:
        oracle(kv)


class CommitsOnLaunch(World):
    """A scheduler that seals what it has scheduled; the sealed count is not checked, so the device must tell."""

    def on_launch(self, sequence: Sequence) -> None:
        self.cache.commit(sequence.table, min(sequence.num_launched, len(sequence.tokens)))

    def check(self) -> None:
        self.cache.check([sequence.table for sequence in self.running])


def test_sealing_scheduled_tokens_serves_rubbish() -> None:
    with pytest.raises(AssertionError, match="reads tag -1"):
        machine(REAL, CommitsOnLaunch)
