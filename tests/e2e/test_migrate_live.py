"""Expert placements that change all the time under load: no token changes. About 20 s on two busy cores.

Every layer heads for another random placement as soon as it has reached one, and now and then earlier, while requests
run; answers are compared with transformers'. A second run damages rows on their way.
"""

import functools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from phalanx import LLM
from phalanx.kernels.row_seal import SEAL_BYTES
from phalanx.runtime import row_transfers
from phalanx.runtime.plan import MovesDone
from tests.support.engines import SHARING_CORES, forked_ranks
from tests.support.oracle import Oracle, make_oracle
from tests.support.traffic import Traffic, planner_of, random_placement

NUM_STREAMS = 8
LIMITS: dict[str, Any] = {
    "scheduler": {"max_batch_tokens": 64, "max_sequences": NUM_STREAMS, "max_model_len": 112},
    "kv": {"num_blocks": 160, "block_size": 8, "prefix_cache": False},
}
TITLE = "experts on the move under load: flips, rows moved, requests answered"


class Restless:
    """Sends each MoE layer somewhere else whenever it has arrived, and sometimes on its way."""

    def __init__(self, llm: LLM, seed: int) -> None:
        self.planner, self.rng = planner_of(llm.engine), random.Random(seed)

    def stir(self) -> None:
        for index, layer in enumerate(self.planner.placements):
            if not self.planner.is_migrating or self.rng.random() < 0.1:
                size = self.planner.config.slots_of(index)
                self.planner.migrate({index: random_placement(self.rng, layer, size)})


def drive(llm: LLM, oracle: Oracle, num_flips: int) -> Traffic:
    """Answer requests until so many layers have switched, and then those that are open."""
    traffic, restless = Traffic(llm.engine, oracle, NUM_STREAMS), Restless(llm, 5)
    while restless.planner.num_flips < num_flips:
        restless.stir()
        traffic.turn()
        restless.planner.check()
    traffic.finish()
    return traffic


@pytest.mark.multi
@pytest.mark.parametrize(
    ("data", "moe"),
    [
        (2, {"dispatch": "flat"}),
        (2, {"dispatch": "allgather", "redundant_experts": 2}),
        (4, {"dispatch": "two_hop", "node_size": 2, "redundant_experts": 6}),
    ],
    ids=["data 2", "data 2, redundant", "data 4, two nodes"],
)
def test_placements_change_all_the_time(
    moe_oracle: Oracle, data: int, moe: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    with forked_ranks(), LLM(str(moe_oracle.path), data=data, moe=moe, **SHARING_CORES, **LIMITS) as llm:
        traffic = drive(llm, moe_oracle, num_flips=150)
        planner = planner_of(llm.engine)
        assert traffic.num_done >= NUM_STREAMS
        assert planner.num_moved > 200
        assert all(layer.version > 30 for layer in planner.placements)
        cell = f"{planner.num_flips} {planner.num_moved} {traffic.num_done}"
    record_property("table", (TITLE, f"data {data}", moe["dispatch"], cell))


@pytest.mark.multi
def test_stages_and_tensor_ranks_move_their_own(moe_oracle: Oracle) -> None:
    moe = {"dispatch": "flat", "redundant_experts": 2}
    with forked_ranks(), LLM(str(moe_oracle.path), tensor=2, pipeline=2, moe=moe, **SHARING_CORES, **LIMITS) as llm:
        drive(llm, moe_oracle, num_flips=60)


@pytest.mark.multi
def test_layers_of_different_sizes_move(tmp_path: Path) -> None:
    """3, 5 and 8 experts on 3 ranks of at most 4 slots: the first layer is whole on every rank."""
    oracle, moe = make_oracle("pr_moe", tmp_path), {"dispatch": "flat", "redundant_experts": 4}
    with forked_ranks(), LLM(str(oracle.path), data=3, moe=moe, **SHARING_CORES, **LIMITS) as llm:
        drive(llm, oracle, num_flips=40)
        assert [layer.num_slots for layer in planner_of(llm.engine).placements] == [9, 12, 12]


def damage(rank: int, every: int, folder: Path) -> None:
    """A hook: one byte of every n-th row that the rank sends is wrong, after it was sealed."""
    seal, count, rng = row_transfers.seal, 0, random.Random(rank)

    def damaged(*args: Any) -> Tensor:
        nonlocal count
        sealed, count = seal(*args), count + 1
        if count % every == 0:
            first = len(sealed) - SEAL_BYTES if count % (5 * every) == 0 else 0
            sealed[rng.randrange(first, len(sealed))] ^= 1 << rng.randrange(8)
            with (folder / str(rank)).open("ab") as file:
                file.write(b"!")
        return sealed

    row_transfers.seal = damaged


@pytest.mark.multi
def test_a_damaged_row_is_refused_and_travels_again(moe_oracle: Oracle, tmp_path: Path) -> None:
    moe = {"dispatch": "flat", "redundant_experts": 2}
    hook = functools.partial(damage, every=4, folder=tmp_path)
    with forked_ranks(hook=hook), LLM(str(moe_oracle.path), data=2, moe=moe, **SHARING_CORES, **LIMITS) as llm:
        planner, refused = planner_of(llm.engine), list[int]()
        take = planner.on_moves

        def count(done: MovesDone) -> None:
            refused.extend(done.failed)
            take(done)

        planner.on_moves = count  # type: ignore[method-assign]
        drive(llm, moe_oracle, num_flips=60)
    assert len(refused) == sum(os.stat(tmp_path / str(rank)).st_size for rank in range(2))
    assert len(refused) > 20, "each damaged row was refused, no other"


@pytest.mark.multi
def test_rebalancing_by_itself(moe_oracle: Oracle) -> None:
    """The policy looks, a thread solves, and what cools the hottest rank moves, while requests run."""
    moe = {"dispatch": "flat", "redundant_experts": 2, "rebalance": {"interval_steps": 40, "max_moved": 0.5}}
    with forked_ranks(), LLM(str(moe_oracle.path), data=2, moe=moe, **SHARING_CORES, **LIMITS) as llm:
        planner, traffic = planner_of(llm.engine), Traffic(llm.engine, moe_oracle, NUM_STREAMS)
        size = planner.config.slots_per_rank
        first = planner.placements
        traffic.until(lambda: planner.num_flips > 0 and not planner.is_migrating)
        loads = planner.load.load()
        before = [layer.balancedness(load, size) for layer, load in zip(first, loads, strict=True)]
        after = [layer.balancedness(load, size) for layer, load in zip(planner.placements, loads, strict=True)]
        traffic.finish()
    assert planner.num_moved > 0
    assert sum(after) > sum(before)


@pytest.mark.multi
def test_rebalancing_off_and_by_hand(moe_oracle: Oracle) -> None:
    moe = {"dispatch": "flat", "redundant_experts": 2, "rebalance": {"interval_steps": 0}}
    with forked_ranks(), LLM(str(moe_oracle.path), data=2, moe=moe, **SHARING_CORES, **LIMITS) as llm:
        planner, traffic = planner_of(llm.engine), Traffic(llm.engine, moe_oracle, NUM_STREAMS)
        traffic.turns(200)
        assert planner.num_flips == 0
        llm.engine.mesh.rebalance()
        traffic.turns(100)
        assert planner.num_flips > 0
        traffic.finish()
