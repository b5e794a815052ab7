"""A layer's placement while a solver changes it: rank loads and constraints kept up to date, changes judged in bulk."""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from phalanx.moe.placement.types import LayerPlacement, Load, reachable_copies
from phalanx.parallel.topology import EpTopology

# Shape suffixes: E logical experts, P ranks, s slots per rank, S = P * s slots, N nodes, C candidates.

EMPTY = -1
NUM_TRIED = 4
"""Experts of the hottest rank that are considered for one more replica; ranks that are considered for a detour."""


class Change(NamedTuple):
    """Two slots exchange their experts, or one slot gets another expert.

    Attributes:
        puts: ((rank, index in the rank, expert), ...).
        peak: highest load of a rank that it touches, afterwards.
    """

    puts: tuple[tuple[int, int, int], ...]
    peak: float


class WorkingTable:
    """Experts on ranks; `EMPTY` slots while a fresh solve fills them.

    Args:
        load_E: tokens per expert.
        topology: the ranks.
        slots_per_rank: s.
        count_E: replicas of each expert when the table is full; where they are not on a rank yet too.
        min_replicas: no change takes a replica from an expert that has not more; clamped to what fits.
    """

    def __init__(
        self,
        load_E: Load,
        topology: EpTopology,
        slots_per_rank: int,
        count_E: NDArray[np.int64],
        min_replicas: int = 1,
    ) -> None:
        num_ranks, num_experts = topology.num_ranks, len(load_E)
        self.min_count = reachable_copies(min_replicas, num_experts, num_ranks * slots_per_rank)
        self.load_E = np.asarray(load_E, dtype=np.float64)
        self.node_of_P = np.array(topology.node_of)
        self.num_nodes = topology.num_nodes
        self.rank_of_S = np.repeat(np.arange(num_ranks), slots_per_rank)
        self.node_of_S = self.node_of_P[self.rank_of_S]
        self.table_Ps = np.full((num_ranks, slots_per_rank), EMPTY)
        self.count_E = count_E.copy()
        self.share_E = self.load_E / count_E
        self.holds_EP = np.zeros((num_experts, num_ranks), dtype=bool)
        self.copies_EN = np.zeros((num_experts, topology.num_nodes), dtype=np.int64)
        self.rank_load_P = np.zeros(num_ranks)

    @classmethod
    def of(
        cls, layer: LayerPlacement, load_E: Load, topology: EpTopology, slots_per_rank: int, min_replicas: int = 1
    ) -> "WorkingTable":
        """A full table."""
        work = cls(load_E, topology, slots_per_rank, np.array(layer.num_replicas), min_replicas)
        work.table_Ps[:] = layer.slots.reshape(-1, slots_per_rank)
        work.holds_EP[layer.slots, work.rank_of_S] = True
        np.add.at(work.copies_EN, (layer.slots, work.node_of_S), 1)
        work.rank_load_P = work.share_E[work.table_Ps].sum(1)
        return work

    def copy(self) -> "WorkingTable":
        """One that changes on its own."""
        other = copy.copy(self)
        other.table_Ps, other.count_E, other.share_E = self.table_Ps.copy(), self.count_E.copy(), self.share_E.copy()
        other.holds_EP, other.copies_EN = self.holds_EP.copy(), self.copies_EN.copy()
        other.rank_load_P = self.rank_load_P.copy()
        return other

    @property
    def peak(self) -> float:
        """Load of the hottest rank over the mean."""
        return float(self.rank_load_P.max() / max(self.rank_load_P.mean(), 1e-300))

    def put(self, rank: int, index: int, expert: int) -> None:
        """Write one slot; `count_E` and the shares stay as they are."""
        old, node = self.table_Ps[rank, index], self.node_of_P[rank]
        if old != EMPTY:
            self.holds_EP[old, rank] = False
            self.copies_EN[old, node] -= 1
            self.rank_load_P[rank] -= self.share_E[old]
        self.table_Ps[rank, index] = expert
        self.holds_EP[expert, rank] = True
        self.copies_EN[expert, node] += 1
        self.rank_load_P[rank] += self.share_E[expert]

    def apply(self, change: Change) -> None:
        """Carry out a change, replica counts included."""
        old = int(self.table_Ps[change.puts[0][:2]])
        for rank, index, expert in change.puts:
            self.put(rank, index, expert)
        if len(change.puts) == 1:
            self._recount(change.puts[0][2], 1)
            self._recount(old, -1)

    def _recount(self, expert: int, by: int) -> None:
        self.count_E[expert] += by
        share = self.load_E[expert] / self.count_E[expert]
        self.rank_load_P[self.holds_EP[expert]] += share - self.share_E[expert]
        self.share_E[expert] = share

    def best_swap(self, hot: int) -> Change | None:
        """The exchange between rank `hot` and another that leaves the lower peak of the two; None if none may be.

        It makes no duplicate, and puts no more than its share of an expert's replicas, ceil(count / N), into a node.
        """
        return next(self._lowest(hot, self._swap_peaks(hot), 1), None)

    def cooling_swaps(self, hot: int, load: float) -> list[Change]:
        """Exchanges that bring `hot` down to `load`, whatever they do to the other rank; the lowest peaks first."""
        peak_sS = self._swap_peaks(hot)
        after_sS = self.rank_load_P[hot] - self._less(hot)
        return list(self._lowest(hot, np.where(after_sS <= load, peak_sS, np.inf), NUM_TRIED))

    def _less(self, hot: int) -> NDArray[np.float64]:
        """What `hot` loses by exchanging each of its slots for each of all."""
        return np.asarray(self.share_E[self.table_Ps[hot]][:, None] - self.share_E[self.table_Ps.reshape(-1)])

    def _swap_peaks(self, hot: int) -> NDArray[np.float64]:
        """(s, S) higher load of the two ranks after each exchange; infinite where it may not be."""
        mine_s, all_S = self.table_Ps[hot], self.table_Ps.reshape(-1)
        less_sS = self._less(hot)
        peak_sS = np.maximum(self.rank_load_P[hot] - less_sS, self.rank_load_P[self.rank_of_S] + less_sS)
        allowed_sS = ~self.holds_EP[mine_s][:, self.rank_of_S] & ~self.holds_EP[all_S, hot]
        if self.num_nodes > 1:
            room_EN = self.copies_EN < -(-self.count_E // self.num_nodes)[:, None]
            same_S = self.node_of_S == self.node_of_P[hot]
            allowed_sS &= (room_EN[mine_s][:, self.node_of_S] & room_EN[all_S, self.node_of_P[hot]]) | same_S
        return np.where(allowed_sS, peak_sS, np.inf)

    def _lowest(self, hot: int, peak_sS: NDArray[np.float64], most: int) -> Iterator[Change]:
        """The best exchange with each of the `most` best ranks."""
        size = len(peak_sS)
        best_S = peak_sS.argmin(0)
        peak_Ps = peak_sS[best_S, np.arange(len(best_S))].reshape(-1, size)
        other_P, peak_P = peak_Ps.argmin(1), peak_Ps.min(1)
        for rank in np.argsort(peak_P, kind="stable")[:most].tolist():
            if peak_P[rank] < np.inf:
                other = int(other_P[rank])
                index = int(best_S[rank * size + other])
                given, taken = int(self.table_Ps[hot, index]), int(self.table_Ps[rank, other])
                yield Change(((hot, index, taken), (rank, other, given)), float(peak_P[rank]))

    def replicas(self, hot: int) -> list[Change]:
        """For each of `hot`'s hottest experts: the slot of a replicated expert that is best given to it."""
        hottest = self.table_Ps[hot][np.argsort(-self.share_E[self.table_Ps[hot]], kind="stable")[:NUM_TRIED]]
        return [change for expert in hottest.tolist() if (change := self._best_slot(expert))]

    def repair(self) -> Change | None:
        """One more replica for the expert that lacks most, the hottest of such; None when each has `min_count`.

        There is always a slot for it: some expert has more than `min_count`, so it is on a rank that this one is not.
        """
        if self.count_E.min() >= self.min_count:
            return None
        lacking = np.flatnonzero(self.count_E == self.count_E.min())
        expert = int(lacking[self.share_E[lacking].argmax()])
        return self._best_slot(expert) or self._best_slot(expert, spread_out=False)

    def _best_slot(self, expert: int, *, spread_out: bool = True) -> Change | None:
        """The slot whose loss, for one more replica of `expert`, leaves the lowest peak.

        Its expert has replicas to spare; its node has room for one more of `expert`, unless not `spread_out`.
        """
        slots_C = np.flatnonzero(self.count_E[self.table_Ps.reshape(-1)] > self.min_count)
        allowed_C = ~self.holds_EP[expert, self.rank_of_S[slots_C]]
        if self.num_nodes > 1 and spread_out:
            room_N = self.copies_EN[expert] < -(-(self.count_E[expert] + 1) // self.num_nodes)
            allowed_C &= room_N[self.node_of_S[slots_C]]
        slots_C = slots_C[allowed_C]
        if not len(slots_C):
            return None
        victims_C, ranks_C = self.table_Ps.reshape(-1)[slots_C], self.rank_of_S[slots_C]
        share = self.load_E[expert] / (self.count_E[expert] + 1)
        more_C = self.load_E[victims_C] / (self.count_E[victims_C] - 1) - self.share_E[victims_C]
        holds_CP = self.holds_EP[victims_C]
        after_CP = self.rank_load_P + holds_CP * more_C[:, None]
        after_CP += self.holds_EP[expert] * (share - self.share_E[expert])
        after_CP[np.arange(len(slots_C)), ranks_C] = self.rank_load_P[ranks_C] - self.share_E[victims_C] + share
        peak_C = np.where(holds_CP | self.holds_EP[expert], after_CP, 0).max(1)
        best = int(peak_C.argmin())
        rank, index = divmod(int(slots_C[best]), self.table_Ps.shape[1])
        return Change(((rank, index, expert),), float(peak_C[best]))
