"""The controller core under seeded faults, against a run without any; and with its guards taken out (about 12 s)."""

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

from phalanx.runtime.controller.core import Core
from phalanx.runtime.controller.fleet import Fleet
from phalanx.runtime.controller.jobs import Choice, Job
from phalanx.runtime.controller.replicas import Replica
from tests.runtime.controller.world import World

SEEDS = range(80)


def test_streams_are_exact_under_faults() -> None:
    num_events = num_faults = num_migrated = num_fenced = 0
    for seed in SEEDS:
        world = World(seed)
        try:
            world.run()
        except AssertionError:
            print(f"seed {seed}; last events:", *world.trace[-15:], sep="\n  ")
            raise
        num_events += len(world.trace)
        num_faults += world.num_faults
        num_migrated += world.core.meters.migrations.total()
        num_fenced += world.core.meters.fenced.total()
    print(f"{num_events} events, {num_faults} faults, {num_migrated} migrations, {num_fenced} messages fenced")
    assert num_events > 20_000
    assert num_faults > 1_000
    assert num_migrated > 200


def test_nothing_is_fenced_without_faults() -> None:
    for seed in range(5):
        world = World(seed, faults=False)
        world.run()
        assert not world.core.meters.losses
        assert not world.core.meters.migrations
        assert set(world.core.meters.fenced) <= {"finished", "epoch"}  # rows under way when a job was cancelled


def test_same_seed_same_trace() -> None:
    first, second = World(3), World(3)
    first.run()
    second.run()
    assert first.trace == second.trace


MUTANTS: dict[str, tuple[type, str, str, str]] = {
    "no epoch check": (Core, "_take", "row.epoch != job.epoch", "False"),
    "no incarnation check": (Replica, "accepts", "incarnation == self.incarnation", "True"),
    "repeated positions appended": (
        Choice,
        "_append",
        "num_known = self.num_tokens - row.first_position",
        "num_known = 0",
    ),
    "rows ahead appended": (Choice, "take", "row.first_position > self.num_tokens", "False"),
    "rows ahead dropped": (Choice, "take", "self.held.append(row)", "pass"),
    "held rows survive a move": (Job, "unplace", "choice.held.clear()", "pass"),
    "old incarnation may connect": (Fleet, "hello", "hello.incarnation < replica.incarnation", "False"),
    "incarnation used twice": (Fleet, "hello", "replica.hello is not None", "False"),
    "rows after the finish": (
        Core,
        "_take",
        "choice.finish is not None:\n        self.meters.fenced",
        "False:\n        self.meters.fenced",
    ),
    "epoch survives the fence": (Job, "unplace", "self.epoch = 0", "pass"),
    "no lease": (Fleet, "lapsed", "silent_s > lease_s", "False"),
    "jobs of a lost link stay": (Fleet, "disconnected", 'self._lose(replica, "link", error)', "[]"),
    "submit is not idempotent": (Core, "_submit", "known is not None", "False"),
    "outputs flattened away": (
        Job,
        "place",
        "pack_ids(choice.output.token_ids)",
        "pack_ids(choice.output.token_ids[1:])",
    ),
    "a stopped choice runs on": (Core, "_take", "replica.num_choices -= 1", "pass"),
}


def mutated(owner: type, name: str, old: str, new: str) -> Callable[..., Any]:
    """The method with one piece of its source replaced."""
    function = inspect.unwrap(owner.__dict__[name])
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{owner.__name__}.{name} holds {old!r} {source.count(old)} times"
    namespace: dict[str, Any] = {}
    exec(compile(source.replace(old, new), f"<mutant of {name}>", "exec"), function.__globals__, namespace)
    return namespace[name]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_guard_is_needed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, old, new = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, mutated(owner, name, old, new))
    for seed in SEEDS:
        try:
            World(seed).run()
        except (AssertionError, KeyError, ValueError, IndexError):
            return
    pytest.fail(f"{len(SEEDS)} seeds pass without the guard")
