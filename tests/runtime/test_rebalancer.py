"""The rebalancer over ranks that move at once: second copies come back, load or not, a few slots at a time (2 s)."""

import re
import time
from dataclasses import replace

import numpy as np
import pytest

from phalanx.moe.placement import linear, spread
from phalanx.moe.placement.types import LayerPlacement
from phalanx.parallel.topology import EpTopology
from phalanx.runtime.dispatch_policy import DispatchPolicy
from phalanx.runtime.expert_config import ExpertConfig
from phalanx.runtime.expert_load import num_single_experts
from phalanx.runtime.expert_planner import REPORT_STEPS, ExpertPlanner
from phalanx.runtime.next_generation import NextGeneration
from phalanx.runtime.plan import ExpertLoad, MovesDone
from phalanx.runtime.rebalancer import Rebalancer
from tests.support import placement_study as study

NUM_EXPERTS, NUM_RANKS, SLOTS = 64, 8, 20
CONFIG = ExpertConfig(
    dispatch="flat",
    exact=False,
    num_experts=(NUM_EXPERTS,) * 2,
    stage_of=(0, 0),
    row_bytes=10**6,
    slots_per_rank=SLOTS,
    on_rank_loss="shrink",
)
LOAD_E = study.zipf(np.random.default_rng(0), NUM_EXPERTS, 1.0)
SOME_SINGLE = spread.place_layer(LOAD_E, EpTopology.uniform(2, 4), SLOTS)
ALL_DOUBLE = linear.linear([NUM_EXPERTS], NUM_RANKS, SLOTS).layers[0]


def planner_of(layer: LayerPlacement, config: ExpertConfig = CONFIG) -> ExpertPlanner:
    topology = EpTopology.uniform(2, layer.num_slots // SLOTS // 2)
    return ExpertPlanner(config, [topology], [layer, layer], DispatchPolicy("flat", [topology], None, 1))


def run(planner: ExpertPlanner, rebalancer: Rebalancer, num_steps: int, load: bool = False) -> int:
    """Steps whose moves are over at once, solves waited for; returns how many steps begin with some expert alone."""
    counts = np.round(1000 * LOAD_E).astype("<i8").tobytes()
    num_alone = 0
    for _ in range(num_steps):
        rebalancer.tick(is_scaling=False)
        until = time.monotonic() + 10
        while rebalancer.is_solving and time.monotonic() < until:
            time.sleep(0.001)
            rebalancer.tick(is_scaling=False)
        assert not rebalancer.is_solving
        num_alone += num_single_experts(CONFIG, planner.placements) > 0
        step = planner.step([8] * planner.topologies[0].num_ranks)
        for move in step.moves:
            planner.on_moves(MovesDone(move.target // SLOTS, [move.id], []))
        if load:
            planner.on_load(ExpertLoad(0, 0, [counts] * 2, 0))
        planner.check()
    return num_alone


@pytest.mark.parametrize("load", [False, True])
def test_second_copies_come_back_long_before_the_next_look(load: bool) -> None:
    planner = planner_of(SOME_SINGLE)
    rebalancer = Rebalancer(planner)
    assert num_single_experts(CONFIG, planner.placements) == 2 * SOME_SINGLE.num_replicas.count(1) > 40
    num_alone = run(planner, rebalancer, 200, load)
    assert num_single_experts(CONFIG, planner.placements) == 0
    assert num_alone < REPORT_STEPS
    moved, limit = planner.num_moved, int(CONFIG.max_moved * SOME_SINGLE.num_slots)
    assert moved <= 2 * -(-SOME_SINGLE.num_replicas.count(1) // limit) * limit
    run(planner, rebalancer, 100, load)
    assert planner.num_moved == moved, "then it is left alone until the interval is over"


def test_left_alone_where_a_lost_rank_ends_the_replica_or_nothing_is_rebalanced() -> None:
    for config in (replace(CONFIG, on_rank_loss="restart"), replace(CONFIG, rebalance_interval=0)):
        planner = planner_of(SOME_SINGLE, config)
        run(planner, Rebalancer(planner), 100)
        assert planner.num_moved == 0


def test_skewed_load_takes_no_second_copy() -> None:
    config = replace(CONFIG, rebalance_interval=40)
    planner = planner_of(ALL_DOUBLE, config)
    before = ALL_DOUBLE.balancedness(LOAD_E, SLOTS)
    rebalancer = Rebalancer(planner)
    assert run(planner, rebalancer, 300, load=True) == 0
    rebalancer.force()
    assert run(planner, rebalancer, 50) == 0
    assert planner.num_moved > 0
    assert min(x.balancedness(LOAD_E, SLOTS) for x in planner.placements) > max(0.9, before)


def test_after_a_lost_rank() -> None:
    """A rank of 8 dies, and 140 slots still hold all twice: the first look is at once."""
    planner = planner_of(ALL_DOUBLE)
    rebalancer = Rebalancer(planner)
    run(planner, rebalancer, 50)
    after = NextGeneration(range(8), [0, 1, 2, 4, 5, 6, 7], planner, 1)
    assert after.loss() == ""
    planner.enter([EpTopology.of_names("aaabbbb")], after.placements())
    rebalancer.enter()
    assert num_single_experts(CONFIG, planner.placements) > 0
    assert run(planner, rebalancer, 40) < 6
    assert num_single_experts(CONFIG, planner.placements) == 0


def test_scaling_down_moves_second_copies_too() -> None:
    planner = planner_of(ALL_DOUBLE)
    smaller = NextGeneration(range(8), [0, 1, 2, 4, 5, 6, 7], planner, 1)
    assert smaller.is_evacuated, "no expert is only on the one that goes"
    assert {min(layer.num_replicas) for layer in smaller.placements()} == {1}
    planner.migrate(smaller.evacuation())
    run(planner, Rebalancer(planner), 50)
    assert smaller.evacuation() == {}
    assert {min(layer.num_replicas) for layer in smaller.placements()} == {2}


def test_ranks_that_join_bring_second_copies() -> None:
    planner = planner_of(SOME_SINGLE)
    larger = NextGeneration(range(8), range(9), planner, 1)
    assert larger.evacuation() == {}, "nobody leaves"
    before, after = num_single_experts(CONFIG, planner.placements), num_single_experts(CONFIG, larger.placements())
    assert after == before - 2 * SLOTS


def test_forced_it_restores_what_one_look_may_move() -> None:
    planner = planner_of(SOME_SINGLE, replace(CONFIG, rebalance_interval=0))
    rebalancer = Rebalancer(planner)
    rebalancer.force()
    run(planner, rebalancer, 50)
    limit = int(CONFIG.max_moved * SOME_SINGLE.num_slots)
    assert [layer.num_replicas.count(1) for layer in planner.placements] == [
        SOME_SINGLE.num_replicas.count(1) - limit
    ] * 2


@pytest.mark.parametrize(
    ("layer", "survivors", "message"),
    [
        (ALL_DOUBLE, [1, 2, 3, 4, 5, 6, 7], r"^$"),
        (
            ALL_DOUBLE,
            [0, 1, 3, 4, 6, 7],
            r"\(2 layers lack some\), so .* each had more than one copy, all on ranks lost",
        ),
        (
            LayerPlacement(0, tuple(range(64)) + tuple(range(36))),
            [0, 1, 2, 4],
            r"no other rank has experts \[60, 61, 62, 63\] of MoE layer 0 \(2 layers lack some\), so the replica "
            r"restarts; 100 expert slots do not hold all 64 twice: raise moe.redundant_experts, or scale up",
        ),
        (
            SOME_SINGLE,
            [1, 2, 3, 4, 5, 6, 7],
            r"160 expert slots hold all 64 twice, but \[[\d, ]+\] had one copy; .* unless moe.rebalance.interval_steps",
        ),
    ],
)
def test_a_fatal_loss_says_what_was_missing(layer: LayerPlacement, survivors: list[int], message: str) -> None:
    num_ranks = layer.num_slots // SLOTS
    topology = EpTopology.uniform(1, num_ranks)
    planner = ExpertPlanner(CONFIG, [topology], [layer, layer], DispatchPolicy("flat", [topology], None, 1))
    loss = NextGeneration(range(num_ranks), survivors, planner, 1).loss()
    assert re.search(message, loss)
