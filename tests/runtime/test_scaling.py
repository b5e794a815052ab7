"""The scaling transaction as a pure machine: every phase x every failure, then any order of events. About 2 s."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.runtime.scaling import (
    COMMITTING_S,
    PREPARING_S,
    REPAIR_S,
    Build,
    Commit,
    Effect,
    Evacuate,
    Fail,
    Grow,
    ScaleGoal,
    ScaleOp,
    Undo,
    next_units,
)

RANKS_OF = {unit: (2 * unit, 2 * unit + 1) for unit in range(6)}
GOALS = {
    "grow": ScaleGoal("op", 7, (0, 1), (0, 1, 2), RANKS_OF),
    "shrink": ScaleGoal("op", 7, (0, 1, 2), (0, 1), RANKS_OF),
    "both": ScaleGoal("op", 7, (0, 1), (0, 3), RANKS_OF),
    "repair": ScaleGoal("op", 7, (0, 1, 2), (0, 2), RANKS_OF, is_repair=True),
}


class Run:
    """An operation with the effects it has had."""

    def __init__(self, goal: ScaleGoal) -> None:
        self.goal, self.op = goal, ScaleOp(goal)
        self.effects: list[Effect] = self.op.start(0.0)

    def do(self, effects: list[Effect]) -> list[Effect]:
        self.effects += effects
        return effects

    def load(self) -> None:
        for rank in self.goal.added:
            self.do(self.op.ready(rank, 1.0))

    def evacuate(self) -> None:
        if self.op.is_evacuating:
            self.do(self.op.evacuated(2.0))

    def build(self) -> None:
        for rank in self.goal.members:
            self.do(self.op.prepared(rank, 7, "", 3.0))

    def names(self) -> list[str]:
        return [type(effect).__name__ for effect in self.effects]


STAGES: dict[str, tuple[Callable[[Run], None], ...]] = {
    "begun": (),
    "loaded": (Run.load,),
    "evacuated": (Run.load, Run.evacuate),
    "built": (Run.load, Run.evacuate, Run.build),
}


def at(goal: ScaleGoal, stage: str) -> Run:
    run = Run(goal)
    for act in STAGES[stage]:
        act(run)
    return run


@pytest.mark.parametrize(
    ("kind", "names"),
    {
        "grow": ["Grow", "Build", "Commit"],
        "shrink": ["Evacuate", "Build", "Commit"],
        "both": ["Grow", "Evacuate", "Build", "Commit"],
        "repair": ["Build", "Commit"],
    }.items(),
)
def test_the_way_to_done(kind: str, names: list[str]) -> None:
    run = at(GOALS[kind], "built")
    assert run.op.phase == "COMMITTING"
    assert run.op.holds
    run.do(run.op.drained())
    assert run.names() == names
    assert run.op.phase == "DONE"
    assert not run.op.holds
    assert run.effects[0] in (Grow(GOALS[kind].added), Evacuate(), Build())


def test_ranks_of_a_goal() -> None:
    goal = GOALS["both"]
    assert (goal.added, goal.removed, goal.members) == ((6, 7), (2, 3), (0, 1, 6, 7))


VICTIMS = {
    (kind, who): ranks[-1]
    for kind, goal in GOALS.items()
    for who, ranks in {"stays": (0,), "joins": goal.added, "goes": goal.removed}.items()
    if ranks
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("kind", "who"), VICTIMS)
def test_a_lost_rank_undoes_it_before_the_commit(kind: str, who: str, stage: str) -> None:
    run, goal = at(GOALS[kind], stage), GOALS[kind]
    phase, effects = run.op.phase, run.op.lost(VICTIMS[kind, who], "rank x died")
    if who == "goes" and goal.is_repair:  # that loss is what is being repaired
        assert (effects, run.op.phase) == ([], phase)
        return
    assert effects == [Undo()]
    assert (run.op.phase, run.op.detail) == ("ABORTED", "rank x died")
    assert not run.op.holds
    over_for_good(run)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", GOALS)
def test_its_time_is_over(kind: str, stage: str) -> None:
    run = at(GOALS[kind], stage)
    limit = COMMITTING_S + 3.0 if run.op.phase == "COMMITTING" else REPAIR_S if kind == "repair" else PREPARING_S
    assert run.op.tick(limit - 0.01) == []
    effects = run.op.tick(limit)
    if kind == "repair" and stage == "built":  # it waits for no step, only for its turn
        assert effects == []
        effects = run.op.drained()
    ends = {"repair": [Commit] if stage == "built" else [Fail]}
    assert [type(effect) for effect in effects] == ends.get(kind, [Undo])
    assert run.op.is_over
    over_for_good(run)


def test_a_deadline_names_what_is_missing() -> None:
    grow, shrink, built = at(GOALS["grow"], "begun"), at(GOALS["shrink"], "loaded"), at(GOALS["grow"], "loaded")
    built.do(built.op.prepared(0, 7, "", 1.0))
    for run in (grow, shrink, built):
        run.op.tick(PREPARING_S)
    assert grow.op.detail == "the time to wait for ranks [4, 5] is over"
    assert shrink.op.detail == "the time to evacuate the ranks that go is over"
    assert built.op.detail == "the time to wait for ranks [1, 2, 3, 4, 5] is over"


@pytest.mark.parametrize("kind", GOALS)
def test_groups_that_cannot_be_built(kind: str) -> None:
    run = at(GOALS[kind], "evacuated")
    effects = run.op.prepared(0, 7, "no route", 3.0)
    assert run.op.detail == "rank 0 could not build its groups: no route"
    if kind == "repair":  # another rank may have died: wait for the word of it, within the deadline
        assert effects == []
        assert run.op.tick(REPAIR_S) == [
            Fail("op: the time to wait for ranks [0, 1, 4, 5] is over; rank 0 could not build its groups: no route")
        ]
    else:
        assert effects == [Undo()]
    over_for_good(run)


@pytest.mark.parametrize("kind", GOALS)
def test_aborted_by_hand(kind: str) -> None:
    for stage in STAGES:
        run = at(GOALS[kind], stage)
        assert run.op.abort("no need") == [Undo()]
        over_for_good(run)


@pytest.mark.parametrize("kind", GOALS)
def test_done_is_final(kind: str) -> None:
    run = at(GOALS[kind], "built")
    run.do(run.op.drained())
    over_for_good(run)
    assert run.op.phase == "DONE"


def test_strangers_and_repetitions_change_nothing() -> None:
    run = at(GOALS["grow"], "begun")
    assert run.op.ready(0, 1.0) == []
    assert run.op.prepared(4, 7, "", 1.0) == [], "nothing was ordered yet"
    assert run.op.prepared(4, 7, "an error of before", 1.0) == []
    assert run.op.lost(99, "unknown") == []
    assert run.op.drained() == []
    run.load()
    for _ in range(3):
        assert run.op.ready(4, 1.0) == []
        assert run.op.prepared(0, 6, "of another generation", 1.0) == []
        assert run.op.prepared(0, 7, "", 1.0) == []
    assert run.op.phase == "PREPARING"
    assert run.names() == ["Grow", "Build"]


def over_for_good(run: Run) -> None:
    """Late and repeated events of every kind have no effect."""
    phase = run.op.phase
    assert phase in ("DONE", "ABORTED")
    for rank in range(12):
        assert run.op.ready(rank, 5.0) == []
        assert run.op.prepared(rank, 7, "", 5.0) == []
        assert run.op.prepared(rank, 7, "late error", 5.0) == []
        assert run.op.lost(rank, "late loss") == []
    assert run.op.evacuated(5.0) + run.op.drained() + run.op.tick(1e9) + run.op.abort("late") == []
    assert run.op.phase == phase
    assert run.op.is_over
    assert not run.op.holds


class Event(NamedTuple):
    name: str
    rank: int
    error: str
    generation: int


EVENTS = st.builds(
    Event,
    st.sampled_from(["ready", "prepared", "evacuated", "lost", "drained", "tick", "abort", "wait"]),
    st.integers(0, 9),
    st.sampled_from(["", "", "", "broken"]),
    st.sampled_from([7, 7, 7, 6]),
)


@given(st.sampled_from(sorted(GOALS)), st.lists(EVENTS, max_size=40))
def test_any_order_of_events(kind: str, events: list[Event]) -> None:
    """Effects come in their order and once, the commit only when all is there, and it always comes to an end."""
    goal = GOALS[kind]
    run, now = Run(goal), 0.0
    loaded: set[int] = set()
    built: set[int] = set()
    for event in events:
        op, was = run.op, run.op.phase
        ordered = "Build" in run.names()
        match event.name:
            case "ready":
                loaded.add(event.rank)
                run.do(op.ready(event.rank, now))
            case "prepared":
                if ordered and event.generation == 7 and not event.error:
                    built.add(event.rank)
                run.do(op.prepared(event.rank, event.generation, event.error, now))
            case "evacuated" if op.is_evacuating and not op.is_over:
                run.do(op.evacuated(now))
            case "lost":
                run.do(op.lost(event.rank, "lost"))
            case "drained":
                run.do(op.drained())
            case "tick":
                run.do(op.tick(now))
            case "abort":
                run.do(op.abort("by hand"))
            case _:
                now += 0.4 * (REPAIR_S if goal.is_repair else PREPARING_S)
        assert op.phase == was or (was, op.phase) in {
            ("PREPARING", "COMMITTING"),
            ("PREPARING", "ABORTED"),
            ("COMMITTING", "ABORTED"),
            ("COMMITTING", "DONE"),
        }
        if "Build" in run.names():
            assert loaded >= set(goal.added)
            assert not op.is_evacuating
        if op.phase in ("COMMITTING", "DONE"):
            assert built >= set(goal.members)
    for late in (now, now + 1e4, now + 2e4):
        run.do(run.op.tick(late))
    if goal.is_repair:
        run.do(run.op.drained())
    names, rank = run.names(), {"Grow": 0, "Evacuate": 1, "Build": 2, "Commit": 3, "Undo": 3, "Fail": 3}
    assert [rank[name] for name in names] == sorted({rank[name] for name in names}), "in order, each once, one end"
    assert (names[-1] == "Commit") == (run.op.phase == "DONE")
    assert (names[-1] in ("Undo", "Fail")) == (run.op.phase == "ABORTED")
    over_for_good(run)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=12))
def test_units_leave_from_the_end_and_no_number_returns(targets: list[int]) -> None:
    units, next_unit, seen = (0, 1), 2, {0, 1}
    for target in targets:
        new = next_units(units, target, next_unit)
        assert len(new) == target
        assert new[: len(units)] == units[:target]
        assert not seen & set(new[len(units) :])
        seen |= set(new)
        units, next_unit = new, max(next_unit, max(new) + 1)


@pytest.mark.parametrize(
    ("target", "leave", "left"), [(2, {0, 2}, (1, 3)), (1, {0, 2}, (1,)), (3, {3}, (0, 1, 2)), (2, set(), (0, 1))]
)
def test_units_that_shall_leave_go_first(target: int, leave: set[int], left: tuple[int, ...]) -> None:
    assert next_units((0, 1, 2, 3), target, 9, leave) == left
