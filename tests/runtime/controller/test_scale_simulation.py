"""Scaling under seeded faults: the real controller core, engines and a supervisor on a virtual clock (about 4 s).

What an operator has been told must be true: after DONE every incarnation has the new size, after ABORTED the old one,
and a supervisor runs exactly the ranks that the live engine uses.
"""

import heapq
import inspect
import random
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import pytest

from phalanx.errors import ConfigError, UnavailableError
from phalanx.runtime.controller import events as ev
from phalanx.runtime.controller.core import Core, CoreConfig
from phalanx.runtime.controller.fleet import Fleet
from phalanx.runtime.controller.scale import Scaling
from phalanx.runtime.frames import VERSION, AbortScale, Frame, Heartbeat, Hello, Scale, ScaleState
from phalanx.runtime.output import choice_outputs
from phalanx.runtime.scaling import Phase
from tests.runtime.controller.world import ByteTokenizer

SEEDS = range(80)
PLANNED, SIZES = 2, (1, 2, 3, 5)
END_S, QUIET_S = 60.0, 40.0


@dataclass
class Engine:
    """One incarnation: its ranks in dp order, and the operation under way."""

    incarnation: int
    link: int
    ranks: list[int]
    next_rank: int
    is_dead: bool = False
    op_id: str = ""
    phase: Phase = "DONE"
    target: int = 0
    added: list[int] = field(default_factory=list)
    missing: set[int] = field(default_factory=set)


class ScaleWorld:
    """One replica, an operator, a supervisor. `run()` raises AssertionError when a promise is broken."""

    def __init__(self, seed: int) -> None:
        self.rng, self.now, self.trace = random.Random(seed), 0.0, list[str]()
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._serial, self._links, self._names = count(), count(1), count(1)
        self.core = Core(CoreConfig(), partial(choice_outputs, ByteTokenizer()))
        self.engines: dict[int, Engine] = {}
        self.incarnation = 0
        self.processes: set[int] = set()  # ranks that the supervisor runs for the newest incarnation
        self.told = PLANNED  # size that the operator knows
        self.asked: tuple[str, int] | None = None
        self.outcomes: list[str] = []
        self.start_replica()
        self.at(0, self.tick)
        self.at(1, self.operate)
        self.at(2, self.fault)

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (when, next(self._serial), action))

    def after(self, low: float, high: float, action: Callable[[], None]) -> None:
        self.at(self.now + self.rng.uniform(low, high), action)

    def run(self) -> None:
        while self._queue and self._queue[0][0] <= END_S:
            self.now, _, action = heapq.heappop(self._queue)
            action()
        assert self.core.scaling.running is None
        replica = self.core.replicas[0]
        assert replica.state == "ready"
        assert replica.link is not None
        engine = self.engines[replica.link]
        assert len(engine.ranks) == replica.data == self.told
        assert self.processes == set(engine.ranks), "a rank that nobody needs, or one that is missing"

    def handle(self, event: ev.Event) -> None:
        self.trace.append(f"{self.now:.3f} {event}")
        effects = self.core.handle(event, self.now)
        self.core.check()
        for effect in effects:
            match effect:
                case ev.Send(link, frame):
                    self.at(self.now + 0.002, partial(self.deliver, link, frame))
                case ev.Close(link):
                    self.after(0.0, 0.5, partial(self.end_link, link))
                case ev.Reclaim(_, incarnation, _):
                    self.after(0.0, 1.0, partial(self.restart, incarnation))
                case ev.Start(_, incarnation, data) if incarnation == self.incarnation:
                    self.after(0.1, 1.0, partial(self.dial, incarnation, PLANNED if data is None else data))
                case ev.StartRanks(_, incarnation, op_id, units):
                    ranks = [rank for unit in units for rank in unit]
                    self.at(self.now + 0.1, partial(self.start_ranks, incarnation, op_id, ranks))
                case ev.EndRanks(_, incarnation, left):
                    self.at(self.now + 0.1, partial(self.end_ranks, incarnation, left))

    # The operator

    def operate(self) -> None:
        """Ask for another size, follow the operation, compare."""
        self.after(0.05, 0.5, self.operate)
        if self.asked is None:
            if self.now < QUIET_S:
                self.asked = f"op-{next(self._names)}", self.rng.choice(SIZES)
            return
        op_id, data = self.asked
        try:
            self.handle(ev.ApplyScale(op_id, data))
        except UnavailableError:
            return  # and later again
        except ConfigError:
            raise AssertionError("there is one operator") from None
        operation = self.core.scaling.find(op_id)
        assert operation is not None
        if operation.is_over:
            self.outcomes.append(operation.phase)
            self.told = data if operation.phase == "DONE" else self.told
            self.asked = None
            replica = self.core.replicas[0]
            if replica.link is not None:
                assert len(self.engines[replica.link].ranks) == self.told, "the live engine is what was told"

    # The supervisor

    def start_replica(self) -> None:
        self.incarnation += 1
        self.processes = set()
        self.handle(ev.ReplicaStarting(0, self.incarnation))

    def restart(self, incarnation: int) -> None:
        for engine in list(self.engines.values()):
            if engine.incarnation == incarnation:
                self.kill(engine)
        if incarnation == self.incarnation:
            self.start_replica()

    def start_ranks(self, incarnation: int, op_id: str, ranks: list[int]) -> None:
        if incarnation != self.incarnation:
            return
        self.processes |= set(ranks)
        if self.rng.random() < 0.2:
            self.after(0.0, 0.5, partial(self.handle, ev.GrowFailed(0, incarnation, op_id, "no room")))
            return
        for engine in self.engines.values():
            if engine.incarnation == incarnation:
                for rank in ranks:
                    self.after(0.1, 1.0, partial(self.ready, engine, rank))

    def end_ranks(self, incarnation: int, ranks: tuple[int, ...]) -> None:
        if incarnation == self.incarnation:
            self.processes -= set(ranks)

    # Engines

    def dial(self, incarnation: int, data: int) -> None:
        if incarnation != self.incarnation:
            return
        link = next(self._links)
        self.engines[link] = engine = Engine(incarnation, link, list(range(data)), data)
        self.processes = set(engine.ranks)
        self.post(engine, Hello(VERSION, 0, incarnation, "plan", 100, 100, 9, 16, data, {}, []))
        self.beat(engine)

    def post(self, engine: Engine, frame: Frame) -> None:
        # In order: one delay for all of a link. What was sent before a death may still arrive.
        self.at(self.now + 0.003 + engine.link % 3 / 100, partial(self.handle, ev.FrameReceived(engine.link, frame)))

    def beat(self, engine: Engine) -> None:
        if not engine.is_dead:
            self.post(engine, Heartbeat(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))
            self.at(self.now + 0.25, partial(self.beat, engine))

    def deliver(self, link: int, frame: Frame) -> None:
        engine = self.engines.get(link)
        if engine is None or engine.is_dead:
            return
        match frame:
            case Scale(op_id, data):
                assert engine.phase in ("DONE", "ABORTED")
                num_new = max(0, data - len(engine.ranks))
                engine.added = list(range(engine.next_rank, engine.next_rank + num_new))
                engine.op_id, engine.target, engine.next_rank = op_id, data, engine.next_rank + num_new
                engine.missing = set(engine.added)
                self.turn(engine, "PREPARING")
                if not engine.missing:
                    self.after(0.0, 0.5, partial(self.commit, engine, op_id))
            case AbortScale(op_id, reason) if (op_id, engine.phase) == (engine.op_id, "PREPARING"):
                self.turn(engine, "ABORTED", engine.added, reason)

    def ready(self, engine: Engine, rank: int) -> None:
        if engine.phase == "PREPARING" and rank in engine.missing:
            engine.missing.remove(rank)
            if not engine.missing:
                self.commit(engine, engine.op_id)

    def commit(self, engine: Engine, op_id: str) -> None:
        if engine.is_dead or (engine.op_id, engine.phase) != (op_id, "PREPARING"):
            return
        self.turn(engine, "COMMITTING")
        self.after(0.0, 0.2, partial(self.done, engine))

    def done(self, engine: Engine) -> None:
        if not engine.is_dead:
            gone = engine.ranks[engine.target :]
            engine.ranks = [*engine.ranks, *engine.added][: engine.target]
            self.turn(engine, "DONE", gone)

    def turn(self, engine: Engine, phase: Phase, gone: list[int] | None = None, detail: str = "") -> None:
        engine.phase = phase
        wanted = [[rank] for rank in engine.added] if phase == "PREPARING" else []
        self.post(engine, ScaleState(engine.op_id, phase, detail, len(engine.ranks), wanted, gone or [], []))

    # Faults

    def kill(self, engine: Engine) -> None:
        if not engine.is_dead:
            engine.is_dead = True
            self.after(0.05, 1.0, partial(self.end_link, engine.link))

    def end_link(self, link: int) -> None:
        engine = self.engines.get(link)
        if engine is not None:
            engine.is_dead = True
            self.handle(ev.LinkLost(link, "connection reset"))

    def fault(self) -> None:
        if self.now > QUIET_S:
            return
        self.after(0.5, 4.0, self.fault)
        alive = [engine for engine in self.engines.values() if not engine.is_dead]
        match self.rng.choice(("kill", "cut", "seen", "supervisor", "aborted")):
            case "kill" if alive:
                self.kill(alive[-1])
            case "cut" if alive:
                self.end_link(alive[-1].link)
            case "seen" if alive:  # by the supervisor, before the controller sees it
                self.kill(alive[-1])
                self.handle(ev.ReplicaGone(0, alive[-1].incarnation, "sigkill", "killed"))
                self.restart(alive[-1].incarnation)
            case "supervisor":
                self.handle(ev.SupervisorUp())
            case "aborted" if alive and alive[-1].phase == "PREPARING":  # a new rank died while it loaded
                self.turn(alive[-1], "ABORTED", alive[-1].added, "rank lost")

    def tick(self) -> None:
        self.at(self.now + 0.05, self.tick)
        self.handle(ev.Tick())


def test_what_was_told_is_true() -> None:
    outcomes: list[str] = []
    for seed in SEEDS:
        world = ScaleWorld(seed)
        try:
            world.run()
        except AssertionError:
            print(f"seed {seed}; last events:", *world.trace[-25:], sep="\n  ")
            raise
        outcomes += world.outcomes
    print(f"{outcomes.count('DONE')} done, {outcomes.count('ABORTED')} aborted")
    assert min(outcomes.count("DONE"), outcomes.count("ABORTED")) > 150


MUTANTS: dict[str, tuple[type, str, str, str]] = {
    "an operation outlives its incarnation": (Scaling, "settle", "not replica.accepts(part.incarnation)", "False"),
    "the size is not kept": (Scaling, "report", "replica.size = frame.data", "pass"),
    "the size is kept too early": (Scaling, "report", 'frame.phase == "DONE"', 'frame.phase == "COMMITTING"'),
    "ranks that left are not ended": (Scaling, "report", "if frame.gone:", "if False:"),
    "a failed rank is not told": (Scaling, "failed", "replica.accepts(event.incarnation)", "False"),
    "ranks are wanted from nobody": (Scaling, "report", "wanted and not part.wanted", "False"),
    "every question is another operation": (Scaling, "apply", "known is not None", "False"),
    "the size is told before the fence": (Fleet, "starting", "replica.size))", "None))"),
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
            ScaleWorld(seed).run()
        except (AssertionError, KeyError):
            return
    pytest.fail(f"{len(SEEDS)} seeds pass without the guard")
