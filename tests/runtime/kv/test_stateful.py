"""The symbolic KV machine under Hypothesis and under a plain seeded driver (about 4 s)."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.runtime.kv.symbolic import CONFIGS, MAX_SEQUENCES, World, drive

SMALL = st.integers(0, 7)


class Machine(RuleBasedStateMachine):
    world: World

    @initialize(
        block_size=st.sampled_from((1, 2, 4)),
        num_blocks=st.integers(8, 40),
        max_model_len=st.integers(2, 40),
        watermark=st.sampled_from((0.0, 0.1)),
    )
    def start(self, block_size: int, num_blocks: int, max_model_len: int, watermark: float) -> None:
        self.world = World(
            block_size=block_size,
            num_blocks=num_blocks,
            max_model_len=min(max_model_len, (num_blocks - 1) * block_size),
            watermark=watermark,
        )

    @precondition(lambda self: len(self.world.waiting) + len(self.world.running) < MAX_SEQUENCES)
    @rule(namespace=st.integers(0, 1), document=st.integers(0, 2), length=st.integers(0, 39), tail=st.integers(0, 39))
    def add(self, namespace: int, document: int, length: int, tail: int) -> None:
        self.world.add(namespace, document, length, tail)

    @rule(which=SMALL, chunk=st.integers(0, 20), reserve=st.integers(0, 3), flags=st.integers(0, 7))
    def admit(self, which: int, chunk: int, reserve: int, flags: int) -> None:
        self.world.admit(which, chunk, reserve, use_watermark=flags % 2 == 0, use_hits=flags < 6)

    @rule(which=SMALL, num_tokens=st.integers(0, 20), num_drafts=st.integers(0, 3))
    def launch(self, which: int, num_tokens: int, num_drafts: int) -> None:
        self.world.launch(which, num_tokens, num_drafts)

    @rule(sampled=st.integers(0, 1))
    def execute(self, sampled: int) -> None:
        self.world.execute(sampled)

    @rule()
    def fail(self) -> None:
        self.world.execute(0, fails=True)

    @rule(which=SMALL)
    def finish(self, which: int) -> None:
        self.world.finish(which)

    @rule(which=SMALL)
    def preempt(self, which: int) -> None:
        self.world.preempt(which)

    @invariant()
    def check(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=200, stateful_step_count=60, deadline=None, derandomize=True, database=None
)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_ten_thousand_operations(config: dict[str, Any]) -> None:
    world = World(**config)
    drive(world, seed=1, num_steps=10_000)
    # The machine proves nothing about hits, shadows or eviction if it never has any.
    assert world.num_finished > 300
    assert world.cache.hits > 500
    assert sum(block.gen for block in world.cache.pool.blocks) > 10 * world.spec.num_blocks


def test_disabled_cache_allocates_alike_and_finds_nothing() -> None:
    world = World(block_size=2, num_blocks=12, max_model_len=16, enabled=False)
    drive(world, seed=2, num_steps=1000)
    assert world.num_finished > 20
    assert world.cache.hits == world.cache.queries == 0
