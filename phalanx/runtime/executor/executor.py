"""The seam between an engine and its ranks."""

from typing import Protocol

from phalanx.runtime.plan import Ready, StepPlan, StepResult


class HasFileno(Protocol):
    """Something a wait can watch."""

    def fileno(self) -> int:
        """Descriptor that turns readable."""


class Executor(Protocol):
    """Runs plans in order on every rank.

    Attributes:
        ready: what each rank said when it was up, by rank.
    """

    ready: list[Ready]

    def submit(self, plan: StepPlan) -> None:
        """Start a step; may return before it has run."""

    def poll(self, timeout_s: float, wake: HasFileno | None = None) -> list[StepResult]:
        """Results that have arrived, waiting at most `timeout_s` for the first, or until `wake` is readable.

        Raises:
            ReplicaLostError: a rank is dead, frozen or failed; the replica is over.
        """

    def close(self) -> None:
        """End the ranks. Safe to call twice."""
