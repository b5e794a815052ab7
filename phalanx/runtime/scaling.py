"""Growing, shrinking and repairing the expert group of a running replica: a transaction. Pure: events in, effects out.

    PREPARING   new ranks start and load; a shrinking group moves experts off the ranks that will go; the groups of the
                next generation are built beside the ones in use. The old generation serves all the time.
    COMMITTING  no step is planned until those in flight are back; then, at once, all ranks enter the next generation.
    DONE        the removed ranks are ended.    ABORTED   the old size, as if nothing had been.

`Commit` is the point of no return: every failure before it leads to ABORTED, a loss after it is a repair of the new
generation. A repair after a lost rank is the same without a generation that serves: its PREPARING runs while the engine
plans nothing, a further loss ends it for a repair without both, and only its deadline ends the replica.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Phase = Literal["PREPARING", "COMMITTING", "DONE", "ABORTED"]

PREPARING_S = 600.0
COMMITTING_S = 10.0
REPAIR_S = 15.0
"""Ray needs 5 s of them to end a frozen process."""


class Grow(NamedTuple):
    """Start or expect these ranks, and brief each when it comes."""

    ranks: tuple[int, ...]


class Evacuate(NamedTuple):
    """Migrate until every expert is live on the ranks that stay."""


class Build(NamedTuple):
    """Send `Prepare` to every rank of the next generation."""


class Commit(NamedTuple):
    """Send `Enter` to every rank of the next generation and change the scheduler's domains; nothing is in flight."""


class Undo(NamedTuple):
    """Send `Discard` to the members and end the added ranks."""


class Fail(NamedTuple):
    """The replica cannot go on; it restarts."""

    reason: str


Effect = Grow | Evacuate | Build | Commit | Undo | Fail


@dataclass(frozen=True, slots=True)
class ScaleGoal:
    """What an operation is about.

    Attributes:
        op_id: chosen by the caller; the same id is the same operation.
        generation: the next one.
        old, new: units in dp order, before and after.
        ranks_of: of every unit in either.
        is_repair: a member was lost; nothing serves meanwhile.
    """

    op_id: str
    generation: int
    old: tuple[int, ...]
    new: tuple[int, ...]
    ranks_of: dict[int, tuple[int, ...]]
    is_repair: bool = False

    @property
    def added(self) -> tuple[int, ...]:
        """Ranks that join."""
        return tuple(rank for unit in self.new if unit not in self.old for rank in self.ranks_of[unit])

    @property
    def removed(self) -> tuple[int, ...]:
        """Ranks that leave."""
        return tuple(rank for unit in self.old if unit not in self.new for rank in self.ranks_of[unit])

    @property
    def members(self) -> tuple[int, ...]:
        """Ranks of the next generation."""
        return tuple(rank for unit in self.new for rank in self.ranks_of[unit])


class ScaleOp:
    """One operation; call `start` once, then the methods named after what happens. Each returns effects in order."""

    def __init__(self, goal: ScaleGoal) -> None:
        self.goal = goal
        self.phase: Phase = "PREPARING"
        self.detail = ""
        self._loading = set(goal.added)
        self.is_evacuating = bool(goal.removed) and not goal.is_repair
        self._building: set[int] | None = None
        self._deadline = 0.0

    @property
    def is_over(self) -> bool:
        """Nothing more will happen."""
        return self.phase in ("DONE", "ABORTED")

    @property
    def holds(self) -> bool:
        """No step may be planned."""
        return self.phase == "COMMITTING" or (self.goal.is_repair and not self.is_over)

    def start(self, now: float) -> list[Effect]:
        """Begin."""
        self._deadline = now + (REPAIR_S if self.goal.is_repair else PREPARING_S)
        effects: list[Effect] = []
        if self._loading:
            effects.append(Grow(self.goal.added))
        if self.is_evacuating:
            effects.append(Evacuate())
        return effects + self._advance(now)

    def ready(self, rank: int, now: float) -> list[Effect]:
        """A rank has loaded."""
        self._loading.discard(rank)
        return self._advance(now)

    def evacuated(self, now: float) -> list[Effect]:
        """Every expert is live on the ranks that stay."""
        self.is_evacuating = False
        return self._advance(now)

    def prepared(self, rank: int, generation: int, error: str, now: float) -> list[Effect]:
        """A rank has built its groups, or could not."""
        if generation != self.goal.generation or self.phase != "PREPARING" or self._building is None:
            return []
        if error:
            self.detail = f"rank {rank} could not build its groups: {error}"
            # In a repair the likely cause is another lost rank, whose end is not known here yet.
            return [] if self.goal.is_repair else self.abort(self.detail)
        self._building.discard(rank)
        return self._advance(now)

    def lost(self, rank: int, reason: str) -> list[Effect]:
        """A rank is gone, a new or an old one. The loss of a member is for another operation to repair."""
        counts = rank in self.goal.members or (rank in self.goal.removed and not self.goal.is_repair)
        return self.abort(reason) if counts else []

    def drained(self) -> list[Effect]:
        """No step is in flight."""
        if self.phase != "COMMITTING":
            return []
        self.phase = "DONE"
        return [Commit()]

    def tick(self, now: float) -> list[Effect]:
        """Look at the deadline."""
        if self.is_over or now < self._deadline:
            return []
        if self.phase == "COMMITTING":  # a repair waits for no step
            reason = f"steps in flight did not come back within {COMMITTING_S} s"
            return [] if self.goal.is_repair else self.abort(reason)
        missing = sorted(self._loading or self._building or ())
        what = "evacuate the ranks that go" if self.is_evacuating else f"wait for ranks {missing}"
        reason = "; ".join(filter(None, (f"the time to {what} is over", self.detail)))
        effects = self.abort(reason)
        return [Fail(f"{self.goal.op_id}: {reason}")] if self.goal.is_repair else effects

    def abort(self, reason: str) -> list[Effect]:
        """Back to the old size; nothing once the operation is over."""
        if self.is_over:
            return []
        self.phase, self.detail = "ABORTED", reason
        return [Undo()]

    def _advance(self, now: float) -> list[Effect]:
        if self.phase != "PREPARING" or self._loading or self.is_evacuating:
            return []
        if self._building is None:
            self._building = set(self.goal.members)
            return [Build()]
        if self._building:
            return []
        self.phase, self._deadline = "COMMITTING", now + COMMITTING_S
        return []


def next_units(units: Sequence[int], target: int, next_unit: int, leave: Container[int] = ()) -> tuple[int, ...]:
    """Units of another size: those to `leave` go first, then the last ones; new numbers are never old ones."""
    stay = [unit for unit in units if unit not in leave][:target]
    return tuple(stay) + tuple(range(next_unit, next_unit + target - len(stay)))
