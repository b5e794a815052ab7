"""Layers with different numbers of experts in one group: slots, moves, smaller and larger groups. Milliseconds."""

import numpy as np
import pytest

from phalanx import plugins
from phalanx.models.pr_moe import TINY, decoder_config
from phalanx.moe.placement.types import LayerPlacement, Placement
from phalanx.parallel.mesh import MeshShape
from phalanx.parallel.topology import EpTopology
from phalanx.runtime.dispatch_policy import DispatchPolicy
from phalanx.runtime.expert_config import ExpertConfig, ExpertOptions, resolve_experts
from phalanx.runtime.expert_load import rank_loads
from phalanx.runtime.expert_planner import ExpertPlanner
from phalanx.runtime.next_generation import NextGeneration
from phalanx.runtime.plan import MovesDone
from phalanx.runtime.rebalancer import Problem, solve

COUNTS = (3, 5, 8)
SIZES = {1: (3, 5, 8), 2: (3, 4, 4), 4: (2, 2, 2), 3: (3, 3, 3)}


def config(num_ranks: int) -> ExpertConfig:
    experts = resolve_experts(decoder_config(TINY), MeshShape(dp=num_ranks), [(0, 4)], 4, ExpertOptions())
    assert experts is not None
    return experts


def placement(num_ranks: int, policy: str = "linear") -> Placement:
    place = plugins.load("moe/placement", policy).place
    loads = [np.arange(count) for count in COUNTS]
    made: Placement = place(loads, EpTopology.uniform(1, num_ranks), slots_per_rank=config(num_ranks).slots_per_rank)
    made.validate(EpTopology.uniform(1, num_ranks), COUNTS)
    assert made.num_ranks == num_ranks
    return made


def planner_of(num_ranks: int) -> ExpertPlanner:
    topology = EpTopology.uniform(1, num_ranks)
    layers = placement(num_ranks).layers
    return ExpertPlanner(config(num_ranks), [topology], layers, DispatchPolicy("flat", [topology], None, 1))


@pytest.mark.parametrize("num_ranks", SIZES)
@pytest.mark.parametrize("policy", ["linear", "spread", "incremental"])
def test_a_layer_has_no_more_slots_than_experts(policy: str, num_ranks: int) -> None:
    experts = config(num_ranks)
    assert tuple(map(experts.slots_of, range(3))) == SIZES[num_ranks]
    assert [layer.num_slots for layer in placement(num_ranks, policy).layers] == [
        num_ranks * size for size in SIZES[num_ranks]
    ]
    assert len(rank_loads(experts, placement(num_ranks, policy).layers, [np.ones(c, np.int64) for c in COUNTS])) == (
        num_ranks
    )


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_solved_layers_are_reached(num_ranks: int) -> None:
    planner = planner_of(num_ranks)
    loads = [np.array([1, 2, 90][:count] + [1] * (count - 3)) for count in COUNTS]
    problems = {
        index: Problem(loads[index], layer, planner.topologies[0]) for index, layer in enumerate(planner.placements)
    }
    found = solve(problems, planner.config.slots_per_rank, 1.0)
    planner.migrate(found)
    for _ in range(50):
        step = planner.step([1] * num_ranks)
        planner.check()
        for move in step.moves:
            size = planner.config.slots_of(move.layer)
            assert move.source // size != move.target // size
            planner.on_moves(MovesDone(move.target // size, [move.id], []))
    assert not planner.is_migrating
    for index, layer in enumerate(planner.placements):
        size = planner.config.slots_of(index)
        for rank in range(num_ranks):
            assert {*layer.experts_of(rank, size)} == {*found[index].experts_of(rank, size)}


def test_smaller_and_larger_groups_keep_every_expert() -> None:
    planner = planner_of(4)
    with_two_more = NextGeneration(range(4), range(6), planner, 1).placements()
    Placement(2, tuple(with_two_more)).validate(EpTopology.uniform(1, 6), COUNTS)
    planner = planner_of(2)
    larger = NextGeneration([0, 1], [0, 1, 2], planner, 1).placements()
    Placement(4, tuple(larger)).validate(EpTopology.uniform(1, 3), COUNTS)
    topology = EpTopology.uniform(1, 3)
    planner = ExpertPlanner(config(2), [topology], larger, DispatchPolicy("flat", [topology], None, 1))
    leaving = NextGeneration([0, 1, 2], [0, 2], planner, 1)
    for layer, target in leaving.evacuation().items():
        target.validate(planner.config.slots_of(layer), COUNTS[layer])
    planner.enter([topology], [leaving.evacuation().get(i, layer) for i, layer in enumerate(larger)])
    after = NextGeneration([0, 1, 2], [0, 2], planner, 1)
    assert after.is_evacuated
    Placement(4, tuple(after.placements())).validate(EpTopology.uniform(1, 2), COUNTS)


def test_a_layer_of_another_size_is_refused() -> None:
    layers = (LayerPlacement(0, (0, 1, 2, 0)), LayerPlacement(0, (0, 1, 2, 3, 4, 0, 1, 2)))
    with pytest.raises(Exception, match=r"MoE layer 0: 4 slots where 6 are needed"):
        Placement(4, layers).validate(EpTopology.uniform(1, 2), (3, 5))
