"""BlockPool against a slow reference, and the errors a wrong caller gets (about 1 s)."""

import pytest

from phalanx.runtime.kv.pool import BlockPool
from tests.runtime.kv.reference_pool import KEYS, compare
from tests.runtime.kv.symbolic import REAL

K0, K1 = KEYS[:2]


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_reference(seed: int) -> None:
    compare(REAL, seed, num_steps=3000, num_blocks=8 + 4 * seed)


def test_second_release_is_an_error() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(RuntimeError, match=r"release of Block\(1, .*nobody holds"):
        pool.release(blocks)
    pool.check()


def test_free_block_without_contents_cannot_be_acquired() -> None:
    pool = BlockPool(4)
    with pytest.raises(RuntimeError, match="acquire of Block"):
        pool.acquire([pool.blocks[2]])
    pool.check()


@pytest.mark.parametrize("case", ["free", "sealed", "null"])
def test_seal_wants_a_held_open_block(case: str) -> None:
    pool = BlockPool(4)
    block = pool.null if case == "null" else pool.blocks[1]
    if case == "sealed":
        (block,) = pool.allocate(1)
        pool.seal(block, K0, b"t")
    with pytest.raises(RuntimeError, match="seal of Block"):
        pool.seal(block, K1, b"t")
    pool.check()


def test_null_block_is_never_handed_out() -> None:
    pool = BlockPool(5)
    assert [block.id for block in pool.allocate(4)] == [1, 2, 3, 4]
    assert pool.allocate(1) is None


def test_reset_needs_an_idle_pool_and_forgets_contents() -> None:
    pool = BlockPool(4)
    (block,) = pool.allocate(1)
    pool.seal(block, K0, b"t")
    with pytest.raises(RuntimeError, match="1 blocks in use"):
        pool.reset()
    pool.release([block])
    pool.reset()
    assert pool.get(K0) is None
    assert [b.id for b in pool.free_order()] == [1, 2, 3]
    pool.check()


def test_shadow_takes_over_when_the_owner_has_vanished() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    assert pool.seal(first, K0, b"t") is True
    assert pool.seal(second, K0, b"t") is False
    pool.release([first])
    assert pool.get(K0) is first
    (again,) = pool.allocate(1)  # evicts the owner
    assert again is first
    assert pool.get(K0) is None
    pool.release([second])
    assert pool.get(K0) is second
    pool.check()


def test_cold_blocks_are_evicted_first_in_the_order_given() -> None:
    pool = BlockPool(5)
    blocks = pool.allocate(4)
    for block, key in zip(blocks, KEYS, strict=False):
        pool.seal(block, key, b"t")
    pool.release(blocks[:2])
    pool.release(blocks[2:], cold=True)
    assert [block.id for block in pool.free_order()] == [3, 4, 1, 2]


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool, block: setattr(block, "ref", 1),
        lambda pool, block: setattr(block, "hash", None),
        lambda pool, block: setattr(block, "next", block.next.next),
        lambda pool, block: setattr(pool, "num_free", 1),
        lambda pool, block: pool._index.clear(),
        lambda pool, block: setattr(pool.blocks[1], "hash", K1),
    ],
)
def test_check_sees_damage(damage) -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    pool.seal(blocks[1], K0, b"t")
    pool.release(blocks[1:])
    pool.check()
    damage(pool, blocks[1])
    with pytest.raises(AssertionError):
        pool.check()
