"""The seam between an engine and its ranks."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from phalanx.runtime.plan import Order, RankMessage, Ready, StepPlan
from phalanx.runtime.rank_spec import RankSpec


class HasFileno(Protocol):
    """Something a wait can watch."""

    def fileno(self) -> int:
        """Descriptor that turns readable."""


class Came(NamedTuple):
    """A rank asked for with `grow` is there and waits for its `RankSpec`."""

    rank: int
    node: str


class Lost(NamedTuple):
    """A rank that the engine can do without is dead or frozen, or did not come.

    A frozen one must be ended by whoever started it: until then it holds up the others in their exchanges.
    """

    rank: int
    reason: str


Event = RankMessage | Came | Lost


class Executor(Protocol):
    """Runs plans in order on every member.

    Attributes:
        ready: what each rank said when it was up.
        nodes: name of the node of each rank.
        members: ranks that get the plans.
        spare: ranks whose loss is an event; the loss of any other one is an error.
    """

    ready: dict[int, Ready]
    nodes: dict[int, str]
    members: set[int]
    spare: set[int]

    def submit(self, plan: StepPlan) -> None:
        """Start a step on all members; may return before it has run."""

    def send(self, rank: int, order: Order) -> None:
        """Give one rank another order; kept in sequence with the plans."""

    def poll(self, timeout_s: float, wake: HasFileno | None = None) -> list[Event]:
        """What has arrived, waiting at most `timeout_s` for the first, or until `wake` is readable.

        Raises:
            ReplicaLostError: a rank that is not spare is dead, frozen or failed; the replica is over.
        """

    def grow(self, ranks: Sequence[int]) -> None:
        """Start further ranks, or expect them. Each is spare and answers `Came`, `Ready` after `brief`, or `Lost`."""

    def brief(self, spec: RankSpec) -> None:
        """Give a rank that came its orders."""

    def drop(self, ranks: Sequence[int]) -> None:
        """End ranks that are no members; unknown ones are ignored."""

    def close(self) -> None:
        """End the ranks. Safe to call twice."""
