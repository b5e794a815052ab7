"""The expert planner over toy ranks that copy numbers instead of weights, each at its own pace. About 6 s.

A toy slot holds a logical expert, or `DAMAGED`. A rank executes its plans in order, some behind the engine; a row
travels at any moment after both of its ends have begun the step that moves it, as the movers' threads do.
"""

import random
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.moe.placement.linear import linear
from phalanx.moe.placement.types import LayerPlacement
from phalanx.parallel.topology import EpTopology
from phalanx.runtime.dispatch_policy import SWITCH_STEPS, DispatchPolicy
from phalanx.runtime.expert_config import ExpertConfig
from phalanx.runtime.expert_planner import REPORT_STEPS, STEP_BYTES, ExpertPlanner
from phalanx.runtime.plan import ExpertLoad, ExpertStep, Move, MovesDone
from tests.support.placements import Group, groups, layers

DAMAGED = -7
MAX_LAG = 2
"""Plans a rank may be behind the engine."""


def config(group: Group, num_layers: int, staging_rows: int, stages: int = 1, row_bytes: int = 100) -> ExpertConfig:
    return ExpertConfig(
        dispatch="flat",
        exact=False,
        num_experts=(group.num_experts,) * num_layers,
        stage_of=tuple(layer * stages // num_layers for layer in range(num_layers)),
        row_bytes=row_bytes,
        slots_per_rank=group.slots_per_rank,
        staging_rows=staging_rows,
    )


class ToyRank:
    """One rank: its own slots of each layer, its staging rows, and who is meant to have each row."""

    def __init__(self, number: int, placements: list[LayerPlacement], size: int, staging_rows: int) -> None:
        self.number, self.size = number, size
        self.slots = [list(placement.experts_of(number, size)) for placement in placements]
        self.versions = [placement.version for placement in placements]
        self.staging: list[int | None] = [None] * staging_rows
        self.owner: list[int | None] = [None] * staging_rows  # move whose row is on its way here, or waits for its flip
        self.plans: deque[ExpertStep] = deque()
        self.begun: set[int] = set()

    def execute(self, mine: Callable[[Move], bool]) -> None:
        plan = self.plans.popleft()
        for flip in plan.flips:
            assert flip.version == self.versions[flip.layer] + 1, "versions follow each other"
            self.versions[flip.layer] = flip.version
            for row, slot in zip(flip.copies[::2], flip.copies[1::2], strict=True):
                if slot // self.size == self.number:
                    expert = self.staging[row]
                    assert expert is not None, "a row that never came becomes a slot"
                    self.slots[flip.layer][slot % self.size] = expert
                    self.staging[row] = self.owner[row] = None
            table = flip.physical_to_logical[self.number * self.size : (self.number + 1) * self.size]
            assert self.slots[flip.layer] == table, "the slots hold what the table says"
        for move in plan.moves:
            if move.target // self.size == self.number:
                assert self.owner[move.staging] in (None, move.id), "a staging row has one owner"
                self.owner[move.staging] = move.id
            if mine(move):
                self.begun.add(move.id)


class Toy:
    """All ranks of one stage's group, and the messages on their way to the engine."""

    def __init__(self, group: Group, placements: list[LayerPlacement], staging_rows: int, rng: random.Random) -> None:
        self.rng, self.size = rng, group.slots_per_rank
        self.ranks = [ToyRank(r, placements, self.size, staging_rows) for r in range(group.num_ranks)]
        self.moves: list[Move] = []
        self.acks: list[tuple[int, int, bool]] = []
        self.num_damaged = 0

    def submit(self, plan: ExpertStep) -> None:
        self.moves += plan.moves
        for rank in self.ranks:
            rank.plans.append(plan)
            while len(rank.plans) > MAX_LAG:
                self._execute(rank)

    def run(self, damage: float) -> None:
        """Some ranks go on, some rows travel."""
        for rank in self.ranks:
            while rank.plans and self.rng.random() < 0.6:
                self._execute(rank)
        for move in self.moves.copy():
            source, target = self.ranks[move.source // self.size], self.ranks[move.target // self.size]
            if move.id in source.begun and move.id in target.begun and self.rng.random() < 0.6:
                self.moves.remove(move)
                source.begun.discard(move.id)
                target.begun.discard(move.id)
                bad = self.rng.random() < damage
                target.staging[move.staging] = DAMAGED if bad else source.slots[move.layer][move.source % self.size]
                self.num_damaged += bad
                self.acks.append((target.number, move.id, bad))

    def messages(self) -> list[MovesDone]:
        """Some of the acknowledgements, one message per rank."""
        taken = [ack for ack in self.acks if self.rng.random() < 0.7]
        self.acks = [ack for ack in self.acks if ack not in taken]
        numbers = {number for number, _, _ in taken}
        return [
            MovesDone(
                number,
                [move for rank, move, bad in taken if rank == number and not bad],
                [move for rank, move, bad in taken if rank == number and bad],
            )
            for number in sorted(numbers)
        ]

    def _execute(self, rank: ToyRank) -> None:
        rank.execute(lambda move: rank.number in (move.source // self.size, move.target // self.size))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Group, list[LayerPlacement], list[list[LayerPlacement]], int, int]:
    """A group, where its layers are, where they head for one after the other, staging rows, a seed."""
    group = draw(groups(max_ranks=6, max_slots=4))
    num_layers = draw(st.integers(1, 3))
    start = [draw(layers(group)) for _ in range(num_layers)]
    ways = [[draw(layers(group)) for _ in range(draw(st.integers(1, 3)))] for _ in range(num_layers)]
    return group, start, ways, draw(st.integers(1, 4)), draw(st.integers(0, 2**32 - 1))


@settings(max_examples=150)
@given(cases(), st.sampled_from([0.0, 0.3]))
def test_layers_reach_their_targets_whatever_happens(case, damage) -> None:
    """New targets come in mid-flight, rows arrive damaged, ranks lag: slots always hold what the tables say."""
    group, start, ways, staging_rows, seed = case
    rng = random.Random(seed)
    row_bytes = (100, STEP_BYTES // 2, 2 * STEP_BYTES)[seed % 3]
    policy = DispatchPolicy("flat", [group.topology], None)
    planner = ExpertPlanner(
        config(group, len(start), staging_rows, row_bytes=row_bytes), [group.topology], start, policy
    )
    toy = Toy(group, start, staging_rows, rng)
    targets: dict[int, LayerPlacement] = {}
    left = [list(way) for way in ways]
    for _ in range(4000):
        for layer, way in enumerate(left):
            if way and rng.random() < 0.3:
                targets[layer] = way.pop(0)
                planner.migrate({layer: targets[layer]})
        if not any(left) and not planner.is_migrating:
            break
        before = planner.placements
        plan = planner.step([1] * group.num_ranks)
        planner.check()
        assert plan.kind in ("flat", "local")
        assert {flip.layer for flip in plan.flips} == {
            layer for layer, (old, new) in enumerate(zip(before, planner.placements, strict=True)) if old != new
        }, "what the engine says changes with the plan that says so to the ranks"
        toy.submit(plan)
        toy.run(damage)
        for message in toy.messages():
            planner.on_moves(message)
            planner.check()
    else:
        pytest.fail("the layers never reach their targets")
    while any(rank.plans for rank in toy.ranks):
        toy.run(0.0)
    assert not toy.moves
    size = group.slots_per_rank
    for layer, target in targets.items():
        for rank in toy.ranks:
            assert sorted(rank.slots[layer]) == sorted(target.experts_of(rank.number, size))
            assert tuple(rank.slots[layer]) == planner.placements[layer].experts_of(rank.number, size)
    assert all(owner is None for rank in toy.ranks for owner in rank.owner)


def make(
    num_ranks: int = 2, num_experts: int = 4, num_layers: int = 1, staging_rows: int = 2, row_bytes: int = 100
) -> ExpertPlanner:
    topology = EpTopology.uniform(1, num_ranks)
    group = Group(topology, num_experts, num_experts // num_ranks)
    start = linear([num_experts] * num_layers, num_ranks, group.slots_per_rank).layers
    policy = DispatchPolicy("auto", [topology], None)
    return ExpertPlanner(config(group, num_layers, staging_rows, row_bytes=row_bytes), [topology], start, policy)


def swapped() -> LayerPlacement:
    return LayerPlacement(0, (2, 1, 0, 3))


def done(planner: ExpertPlanner, moves: list[Move], failed: tuple[int, ...] = ()) -> None:
    ids = [move.id for move in moves]
    planner.on_moves(MovesDone(0, [i for i in ids if i not in failed], list(failed)))
    planner.check()


def test_moves_then_flip_and_the_table_changes_with_the_flip() -> None:
    planner = make()
    planner.migrate({0: swapped()})
    moves = planner.step([3, 5]).moves
    assert sorted((move.source, move.target) for move in moves) == [(0, 2), (2, 0)]
    assert planner.step([3, 5]).moves == []
    old = planner.placements[0]
    done(planner, moves)
    assert planner.placements[0] == old, "nobody has switched yet"
    assert planner.is_migrating
    (flip,) = planner.step([3, 5]).flips
    assert tuple(flip.physical_to_logical) == (2, 1, 0, 3) == planner.placements[0].physical_to_logical
    assert flip.version == old.version + 1 == planner.placements[0].version
    assert not planner.is_migrating
    assert (planner.num_moved, planner.num_flips) == (2, 1)


def test_a_damaged_row_travels_again_alone() -> None:
    planner = make()
    planner.migrate({0: swapped()})
    moves = planner.step([1, 1]).moves
    done(planner, moves, failed=(moves[1].id,))
    plan = planner.step([1, 1])
    assert (plan.moves, plan.flips) == ([moves[1]], [])
    assert planner.step([1, 1]).moves == []
    done(planner, [moves[1]])
    assert len(planner.step([1, 1]).flips) == 1


def test_the_next_batch_moves_in_the_step_of_the_flip() -> None:
    planner = make(num_experts=8, staging_rows=1)
    planner.migrate({0: LayerPlacement(0, (4, 5, 6, 7, 0, 1, 2, 3))})
    for _ in range(4):
        plan = planner.step([1, 1])
        assert len(plan.moves) == 2
        done(planner, plan.moves)
    assert len(planner.step([1, 1]).flips) == 1
    assert not planner.is_migrating


def test_layers_share_the_staging_rows() -> None:
    planner = make(num_layers=3, staging_rows=2)
    planner.migrate(dict.fromkeys(range(3), swapped()))
    plan = planner.step([1, 1])
    assert sorted({move.layer for move in plan.moves}) == [0, 1]
    done(planner, [move for move in plan.moves if move.layer == 1])
    plan = planner.step([1, 1])
    assert [flip.layer for flip in plan.flips] == [1]
    assert sorted({move.layer for move in plan.moves}) == [2]


@pytest.mark.parametrize(("row_bytes", "rows"), [(2 * STEP_BYTES, 1), (STEP_BYTES // 2, 2), (100, 4)])
def test_a_step_carries_what_it_can(row_bytes: int, rows: int) -> None:
    """Of rows larger than a step's share one, of smaller ones as many as fit; to and from each rank."""
    planner = make(num_experts=8, staging_rows=4, row_bytes=row_bytes)
    planner.migrate({0: LayerPlacement(0, (4, 5, 6, 7, 0, 1, 2, 3))})
    for _ in range(4 // rows):
        plan = planner.step([1, 1])
        assert sorted(move.source // 4 for move in plan.moves) == [0] * rows + [1] * rows
        assert plan.flips == []
        done(planner, plan.moves)
        planner.check()
    assert len(planner.step([1, 1]).flips) == 1
    assert not planner.is_migrating


def test_another_generation_forgets_what_was_under_way() -> None:
    planner = make()
    planner.migrate({0: swapped()})
    late = planner.step([1, 1]).moves
    topology = EpTopology.uniform(1, 3)
    planner.enter([topology], [LayerPlacement(5, (0, 1, 2, 3, 0, 1))])
    planner.check()
    assert not planner.is_migrating
    done(planner, late)
    plan = planner.step([1, 1, 1])
    assert (plan.moves, plan.flips) == ([], [])
    assert planner.placements[0].physical_to_logical == (0, 1, 2, 3, 0, 1)


def test_loads_are_asked_for_and_added() -> None:
    planner = make()
    plans = [planner.step([1, 1]) for _ in range(2 * REPORT_STEPS)]
    assert [index for index, plan in enumerate(plans) if plan.report_load] == [REPORT_STEPS - 1, 2 * REPORT_STEPS - 1]
    for rank in range(2):
        counts = b"".join(value.to_bytes(8, "little") for value in (1, 2, 3, 4))
        planner.on_load(ExpertLoad(rank, 0, [counts], num_dropped=rank))
    assert planner.load.load()[0].tolist() == [2, 4, 6, 8]
    assert planner.num_dropped == 1


# The choice of the dispatcher


def policy(prices: dict[str, float], wanted: str = "auto", nodes: int = 2, tp: int = 1) -> DispatchPolicy:
    return DispatchPolicy(wanted, [EpTopology.uniform(nodes, 2)], lambda tokens, topology: dict(prices), tp)


def test_a_kind_must_be_cheaper_for_some_steps_in_a_row() -> None:
    prices = {"two_hop": 1.0, "flat": 1.0, "allgather": 2.0}
    chosen = policy(prices)
    assert {chosen.choose(5) for _ in range(50)} == {"two_hop"}, "equal prices are no reason"
    prices["flat"] = 0.99
    assert {chosen.choose(5) for _ in range(50)} == {"two_hop"}, "nor is a little"
    prices["flat"] = 0.5
    assert [chosen.choose(5) for _ in range(SWITCH_STEPS)] == ["two_hop"] * (SWITCH_STEPS - 1) + ["flat"]
    prices["two_hop"] = 0.1
    for _ in range(SWITCH_STEPS - 1):
        assert chosen.choose(5) == "flat"
    prices["two_hop"] = 1.0
    assert chosen.choose(5) == "flat", "the streak is broken"
    prices["two_hop"] = 0.1
    assert [chosen.choose(5) for _ in range(SWITCH_STEPS)] == ["flat"] * (SWITCH_STEPS - 1) + ["two_hop"]


def test_costs_that_alternate_do_not_make_it_alternate() -> None:
    prices = {"two_hop": 1.0, "flat": 1.0}
    chosen, kinds = policy(prices), []
    for step in range(200):
        prices["flat"] = 0.1 if step % 2 else 10.0
        kinds.append(chosen.choose(5))
    assert set(kinds) == {"two_hop"}


def test_a_fixed_kind_and_a_group_of_one() -> None:
    prices = {"two_hop": 1.0, "flat": 0.1}
    assert policy(prices, "two_hop").choose(9) == "two_hop"
    alone = DispatchPolicy("two_hop", [EpTopology.uniform(1, 1)], lambda tokens, topology: prices)
    assert alone.choose(9) == "local"
    alone.enter([EpTopology.uniform(1, 2)])
    assert alone.choose(9) == "two_hop"
    unknown = DispatchPolicy("auto", [EpTopology.uniform(1, 2), EpTopology.uniform(2, 1)], None)
    assert unknown.choose(9) == "two_hop", "the widest stage counts"


def test_tensor_ranks_share_the_tokens() -> None:
    asked: list[int] = []

    def costs(tokens: int, topology: EpTopology) -> dict[str, float]:
        asked.append(tokens)
        return {"two_hop": 1.0, "flat": 1.0}

    DispatchPolicy("auto", [EpTopology.uniform(2, 2)], costs, tp=4).choose(9)
    assert asked == [3]
