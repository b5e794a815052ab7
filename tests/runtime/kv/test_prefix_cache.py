"""PrefixCache: each bug class that can occur in one tier, and the contract the scheduler relies on (well under 1 s)."""

import sys
from array import array
from collections.abc import Iterable

import pytest

from phalanx.errors import ConfigError
from phalanx.runtime.kv.hashing import root_hash
from phalanx.runtime.kv.prefix_cache import Match, PrefixCache, Table
from phalanx.runtime.kv.spec import KVSpec
from tests.runtime.kv.oracles import collision
from tests.runtime.kv.symbolic import REAL

ROOT = root_hash({"model": "m"})
B = 4


def make(num_blocks: int = 11, **options) -> PrefixCache:
    return PrefixCache(KVSpec(block_size=B, num_blocks=num_blocks, max_model_len=(num_blocks - 1) * B), **options)


def table(tokens: Iterable[int], root: bytes = ROOT) -> Table:
    return Table(array("I", tokens), root)


def run(cache: PrefixCache, tokens: Iterable[int], root: bytes = ROOT) -> Table:
    """An admitted table whose prompt is computed."""
    new = table(tokens, root)
    assert cache.admit(new, cache.match(new), len(new.tokens), use_watermark=False)
    cache.commit(new, len(new.tokens))
    return new


def num_hits(cache: PrefixCache, tokens: Iterable[int], root: bytes = ROOT) -> int:
    return cache.match(table(tokens, root)).num_tokens


# spec


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 9, 8), r"kv block_size \(0\) is below 1"),
        ((4, 1, 8), r"kv num_blocks \(1\) is below 2"),
        ((4, 9, 0), r"kv max_model_len \(0\) is below 1"),
        ((4, 9, 33), r"num_blocks \(9, .* max_model_len \(33\) .* raise num_blocks to 10 or lower max_model_len to 32"),
    ],
)
def test_impossible_sizes_are_config_errors(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KVSpec(block_size=sizes[0], num_blocks=sizes[1], max_model_len=sizes[2])


def test_max_blocks_rounds_up_and_the_longest_sequence_fits() -> None:
    spec = KVSpec(block_size=4, num_blocks=9, max_model_len=31)
    assert [spec.max_blocks(n) for n in (0, 1, 4, 5, 31)] == [0, 1, 1, 2, 8]
    assert spec.capacity_tokens == 31
    cache = PrefixCache(spec)
    longest = table(range(31))
    assert cache.admit(longest, cache.match(longest), 31, use_watermark=False)


# bug classes


def test_admission_does_not_evict_its_own_hits() -> None:
    cache = make(num_blocks=6)
    cache.free(run(cache, range(16)))  # 4 cached, 1 clean: four of the five are hits below
    again = table([*range(16), 99])
    match = cache.match(again)
    assert cache.admit(again, match, 20, use_watermark=False)
    assert again.blocks[:4] == list(match.blocks)
    cache.check([again])


def test_cached_hits_count_as_needed_blocks() -> None:
    cache = make(num_blocks=6)
    cache.free(run(cache, range(16)))
    other = run(cache, [50, 51])  # takes the clean block: only the four hits are left
    again = table([*range(16), 99])
    assert not cache.admit(again, cache.match(again), 20, use_watermark=False)
    cache.check([other])
    assert cache.num_free == 4


def test_free_twice_is_an_error_even_as_finished_then_preempted() -> None:
    cache = make()
    first = run(cache, range(9))
    cache.free(first)
    with pytest.raises(RuntimeError, match="freed before"):
        cache.free(first)
    with pytest.raises(RuntimeError, match="freed before"):
        cache.free(table(range(3)))
    cache.check([])


def test_no_hash_outlives_its_contents() -> None:
    cache = make(num_blocks=6)
    cache.free(run(cache, range(20)))
    evicting = run(cache, range(100, 120))
    assert num_hits(cache, range(20)) == 0
    cache.check([evicting])


def test_match_pins_and_counts_nothing() -> None:
    cache = make()
    cache.free(run(cache, range(9)))
    state = (cache.num_free, cache.hits, cache.queries, [block.ref for block in cache.pool.blocks])
    for _ in range(3):
        assert num_hits(cache, range(9)) == 8
    assert state == (cache.num_free, cache.hits, cache.queries, [block.ref for block in cache.pool.blocks])


def test_only_settled_tokens_are_found() -> None:
    cache = make()
    running = table(range(16))
    assert cache.admit(running, cache.match(running), 16)
    assert num_hits(cache, range(16)) == 0
    cache.commit(running, 7)
    assert num_hits(cache, range(16)) == 4
    cache.commit(running, 8)
    assert num_hits(cache, range(16)) == 8


def test_commit_refuses_tokens_that_cannot_be_settled() -> None:
    cache = make()
    running = run(cache, range(6))
    with pytest.raises(RuntimeError, match="commit of 8 tokens to a table that knows 6 and holds 8"):
        cache.commit(running, 8)
    cache.free(running)
    with pytest.raises(RuntimeError, match="holds 0"):
        cache.commit(running, 6)


def test_namespaces_share_nothing() -> None:
    cache = make()
    cache.free(run(cache, range(9)))
    assert num_hits(cache, range(9), root_hash({"model": "m", "salt": "s"})) == 0
    assert num_hits(cache, range(9)) == 8


def test_collision_is_a_miss() -> None:
    collision(REAL)


def test_tails_are_evicted_before_heads_and_old_before_new() -> None:
    cache = make(num_blocks=8)
    old = run(cache, range(12))
    new = run(cache, range(100, 112))
    cache.free(old)
    cache.free(new)
    hits = []
    for n in range(7):
        blocker = table(range(500, 500 + n * B + 1))
        assert cache.admit(blocker, cache.match(blocker), n * B + 1, use_watermark=False)
        hits.append((num_hits(cache, range(13)), num_hits(cache, range(100, 113))))
        cache.free(blocker)
    assert hits == [(12, 12), (8, 12), (4, 12), (0, 12), (0, 8), (0, 4), (0, 0)]


# contract


def test_last_token_is_never_a_hit() -> None:
    cache = make()
    cache.free(run(cache, range(8)))
    assert num_hits(cache, range(8)) == 4
    assert num_hits(cache, range(9)) == 8
    assert num_hits(cache, [0]) == 0


def test_refused_admission_is_repeatable() -> None:
    cache = make(num_blocks=6)
    running = run(cache, range(12))
    waiting = table(range(50, 62))
    assert not cache.admit(waiting, cache.match(waiting), 12)
    assert (waiting.blocks, waiting.capacity, cache.computing) == ([], 0, {})
    cache.free(running)
    assert cache.admit(waiting, cache.match(waiting), 12)
    cache.check([waiting])


def test_watermark_and_reserve_keep_blocks_free() -> None:
    cache = make(num_blocks=11, watermark=0.2)
    for num_tokens, options, fits in (
        (36, {}, False),  # 9 of 10, the watermark is 2
        (36, {"use_watermark": False}, True),
        (32, {}, True),
        (32, {"reserve": 1}, False),
        (28, {"reserve": 1}, True),
        (40, {"use_watermark": False}, True),
    ):
        new = table(range(num_tokens))
        assert cache.admit(new, cache.match(new), num_tokens, **options) == fits
        if fits:
            cache.free(new)


def test_outdated_match_is_an_error() -> None:
    cache = make(num_blocks=6)
    cache.free(run(cache, range(9)))
    first = table(range(9))
    match = cache.match(first)
    cache.free(run(cache, range(100, 120)))
    with pytest.raises(RuntimeError, match="call match again"):
        cache.admit(first, match, 9)
    with pytest.raises(RuntimeError, match="call match again"):
        cache.admit(table([1]), Match((cache.pool.blocks[1],), 4), 9)
    cache.check([])


def test_admission_without_a_match_computes_everything_anew() -> None:
    cache = make()
    first = run(cache, range(9))
    fresh, nothing = table(range(9)), Match((), 0)
    assert not cache.is_computing(fresh, nothing)
    assert cache.admit(fresh, nothing, 9, use_watermark=False)
    assert not set(fresh.block_ids) & set(first.block_ids)
    cache.commit(fresh, 9)  # its blocks are shadows of the first table's
    cache.check([first, fresh])
    cache.free(fresh)
    assert cache.num_free == 7
    assert num_hits(cache, range(9)) == 8


def test_admit_of_an_admitted_table_is_an_error() -> None:
    cache = make()
    running = run(cache, range(5))
    with pytest.raises(RuntimeError, match="admit of 5 tokens to a table of 2 blocks"):
        cache.admit(running, cache.match(running), 5)


def test_append_returns_new_ids_all_or_none() -> None:
    cache = make(num_blocks=6)
    running = run(cache, range(5))
    assert cache.append(running, 8) == ()
    assert list(cache.append(running, 13)) == running.block_ids[2:] == [3, 4]
    other = run(cache, [9])
    assert cache.append(running, 24) is None
    assert (running.capacity, cache.num_free) == (16, 0)
    cache.check([running, other])
    with pytest.raises(RuntimeError, match="not admitted"):
        cache.append(table([1]), 1)


def test_nothing_is_allocated_inside_a_block() -> None:
    cache = PrefixCache(KVSpec(block_size=64, num_blocks=4, max_model_len=128))
    running = table([1])
    assert cache.admit(running, cache.match(running), 1, use_watermark=False)
    for _ in range(2):  # the first round warms the interpreter's caches
        before = 0
        before = sys.getallocatedblocks()
        for num_tokens in range(1, 63):
            cache.append(running, num_tokens)
            cache.commit(running, num_tokens)
        after = sys.getallocatedblocks()
    assert after - before <= 1  # `after` itself


def test_counters_are_in_tokens_and_move_on_admission() -> None:
    cache = make()
    cache.free(run(cache, range(10)))
    assert (cache.hits, cache.queries) == (0, 10)
    run(cache, range(10))
    assert (cache.hits, cache.queries) == (8, 20)
    assert cache.usage == pytest.approx(3 / 10)


def test_preempted_table_resumes_from_its_own_blocks_without_hashing_again() -> None:
    cache = make()
    running = run(cache, range(10))
    hashes = list(running.cursor.hashes)
    running.tokens.extend([7, 8])
    cache.commit(running, 11)
    cache.free(running)
    match = cache.match(running)
    assert match.num_tokens == 8
    assert all(a is b for a, b in zip(hashes, running.cursor.hashes, strict=False))
    assert cache.admit(running, match, 12)
    cache.check([running])


def test_wait_only_for_a_block_that_somebody_computes() -> None:
    cache = make(num_blocks=21)
    running, same, longer = table(range(12)), table(range(12)), table(range(16))
    assert cache.admit(running, cache.match(running), 4)  # a first chunk; the rest is promised
    assert cache.is_computing(same, cache.match(same))
    cache.commit(running, 4)
    assert cache.is_computing(same, cache.match(same))
    cache.append(running, 12)
    cache.commit(running, 8)
    # What is left of `same` is its last block, which no hit can cover; `longer` can use it.
    assert not cache.is_computing(same, cache.match(same))
    assert cache.is_computing(longer, cache.match(longer))
    cache.free(running)
    assert not cache.is_computing(longer, cache.match(longer))
    assert cache.computing == {}


def test_two_tables_computing_the_same_are_counted_apart() -> None:
    cache = make(num_blocks=21)
    one, two, waiting = table(range(8)), table(range(8)), table(range(9))
    for each in (one, two):
        assert cache.admit(each, cache.match(each), 8)
    cache.free(one)
    assert cache.is_computing(waiting, cache.match(waiting))
    cache.commit(two, 8)
    assert cache.computing == {}
    assert cache.match(waiting).num_tokens == 8
    cache.check([two])


def test_discarded_contents_are_never_found_again() -> None:
    cache = make()
    good = run(cache, range(8))
    bad = run(cache, range(13))
    cache.free(bad, discard=True)
    # The shared first blocks too: they may be what made it fail, and a retry must not read them.
    assert num_hits(cache, range(13)) == 0
    assert bad.cursor.hashes == []
    cache.check([good])
    bad.tokens[0] = 77
    again = run(cache, bad.tokens)
    cache.check([good, again])
    cache.free(good)
    assert num_hits(cache, range(13)) == 0


def test_disabled_cache_never_hashes() -> None:
    cache = make(enabled=False)
    running = run(cache, range(9))
    assert running.cursor.hashes == []
    cache.free(running)
    assert num_hits(cache, range(9)) == 0
    assert (cache.hits, cache.queries, cache.computing) == (0, 0, {})
    cache.check([])
