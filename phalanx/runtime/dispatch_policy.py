"""Which dispatcher a step uses: fixed by the configuration, or the cheapest by the calibrated cost model. Pure."""

from collections.abc import Callable, Sequence

from phalanx.parallel.topology import EpTopology

SWITCH_STEPS = 8
SWITCH_GAIN = 0.02
"""Another kind must be so much cheaper, for so many steps in a row, before the policy changes its mind.

A change costs nothing itself, so the gain only keeps kinds of equal cost from taking turns.
"""

Costs = Callable[[int, EpTopology], dict[str, float]]
"""(tokens per rank, topology) -> seconds of dispatch and combine per kind."""


class DispatchPolicy:
    """Chooses for all ranks at once, so that they cannot disagree.

    Args:
        wanted: a kind, or "auto".
        topologies: of the stages.
        costs: the model; None = nothing was calibrated: flat inside a node, two_hop across nodes.
        tp: tensor ranks, which share a dp rank's tokens.
    """

    def __init__(self, wanted: str, topologies: Sequence[EpTopology], costs: Costs | None, tp: int = 1) -> None:
        self._wanted, self._costs, self._tp = wanted, costs, tp
        self._kind, self._streak = "", 0
        self.enter(topologies)

    def enter(self, topologies: Sequence[EpTopology]) -> None:
        """Another generation."""
        self._widest = max(topologies, key=lambda topology: (topology.num_nodes, topology.num_ranks))
        self._kind, self._streak = self._usual(), 0

    def fix(self, wanted: str) -> None:
        """Use this kind from the next step on, or "auto"; all kinds may follow each other."""
        self._wanted = wanted
        self._kind, self._streak = self._usual(), 0

    def choose(self, max_tokens: int) -> str:
        """The kind for a step in which the busiest dp rank has `max_tokens`."""
        if self._wanted != "auto" or self._costs is None or self._widest.num_ranks == 1:
            return self._kind
        costs = self._costs(-(-max_tokens // self._tp), self._widest)
        best = min(costs, key=costs.__getitem__)
        if costs[best] < (1 - SWITCH_GAIN) * costs[self._kind]:
            self._streak += 1
            if self._streak >= SWITCH_STEPS:
                self._kind, self._streak = best, 0
        else:
            self._streak = 0
        return self._kind

    def _usual(self) -> str:
        if self._widest.num_ranks == 1:
            return "local"
        if self._wanted not in ("auto", "local"):
            return self._wanted
        return "flat" if self._widest.num_nodes == 1 else "two_hop"
