"""Small oracles that both the unit tests (on the real modules) and the mutants (on damaged ones) are held against."""

from array import array
from types import ModuleType, SimpleNamespace

import pytest


def collision(kv: SimpleNamespace | ModuleType) -> None:
    """Two different blocks under one key: the second request must miss, and its block must not replace the first."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(kv.hashing, "chain", lambda parent, tokens, extra=b"": bytes(32))
    try:
        cache = kv.prefix_cache.PrefixCache(kv.spec.KVSpec(block_size=2, num_blocks=8, max_model_len=6))
        root = kv.hashing.root_hash({})
        first = kv.prefix_cache.Table(array("I", [1, 2, 5]), root)
        assert cache.admit(first, cache.match(first), 3)
        cache.commit(first, 3)
        second = kv.prefix_cache.Table(array("I", [3, 4, 5]), root)
        assert cache.match(second).num_tokens == 0, "a colliding key is a hit"
        assert cache.admit(second, cache.match(second), 3)
        cache.commit(second, 3)
        cache.pool.check()
        assert cache.match(kv.prefix_cache.Table(array("I", [1, 2, 6]), root)).blocks == (first.blocks[0],)
    finally:
        monkeypatch.undo()


def second_release(kv: SimpleNamespace | ModuleType) -> None:
    """A block that is released twice must not get into the free list twice."""
    pool = kv.pool.BlockPool(4)
    blocks = pool.allocate(2)
    pool.release(blocks)
    with pytest.raises(RuntimeError, match="nobody holds"):
        pool.release(blocks)
    pool.check()


def second_free(kv: SimpleNamespace | ModuleType) -> None:
    """A table that is freed twice (finished, then preempted) must be refused, also while others hold its blocks."""
    cache = kv.prefix_cache.PrefixCache(kv.spec.KVSpec(block_size=2, num_blocks=8, max_model_len=6))
    tables = [kv.prefix_cache.Table(array("I", [1, 2, 3]), bytes(32)) for _ in range(2)]
    for table in tables:
        assert cache.admit(table, cache.match(table), 3)
        cache.commit(table, 3)
    cache.free(tables[0])
    with pytest.raises(RuntimeError, match="freed before"):
        cache.free(tables[0])
    cache.check([tables[1]])


def outdated_match(kv: SimpleNamespace | ModuleType) -> None:
    """Blocks that were evicted between match and admit belong to somebody else."""
    cache = kv.prefix_cache.PrefixCache(kv.spec.KVSpec(block_size=2, num_blocks=4, max_model_len=6))
    first, evicting, again = (
        kv.prefix_cache.Table(array("I", tokens), bytes(32)) for tokens in ([1, 2, 3], [7, 8, 9, 10, 11], [1, 2, 3])
    )
    assert cache.admit(first, cache.match(first), 3)
    cache.commit(first, 3)
    cache.free(first)
    match = cache.match(again)
    assert cache.admit(evicting, cache.match(evicting), 5)
    cache.commit(evicting, 5)
    cache.free(evicting)
    with pytest.raises(RuntimeError, match="call match again"):
        cache.admit(again, match, 3)


def namespaces(kv: SimpleNamespace | ModuleType) -> None:
    """Adapter "x" is not salt "x"."""
    assert kv.hashing.root_hash({"adapter": "x"}) != kv.hashing.root_hash({"salt": "x"})
