"""The fresh solve: replicas for the heaviest experts, spread over nodes; then changes that cool the hottest rank."""

import heapq
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from phalanx.moe.placement.cooling import cool
from phalanx.moe.placement.types import LayerPlacement, Load, Placement, check_room, reachable_copies, slots_of
from phalanx.moe.placement.working_table import WorkingTable
from phalanx.parallel.topology import EpTopology

GOOD_PEAK = 1.003
"""Hottest over mean rank load at which the solve ends."""


def place(
    load_LE: Sequence[Load],
    topology: EpTopology,
    previous: Placement | None = None,
    *,
    slots_per_rank: int,
    budget: float = 1.0,
    min_replicas: int = 1,
) -> Placement:
    """Solve every layer from zero; nearly every slot changes.

    Args:
        load_LE: tokens per expert of each layer.
        topology: the P ranks.
        previous: gives versions, and the slot order inside ranks; no say in which rank gets what.
        slots_per_rank: s; P * s >= E in every layer and s <= E in the largest.
        budget: not used.
        min_replicas: copies that every expert gets, whatever its load; what does not fit counts as the most that
            does, floor(S / E).

    Raises:
        ConfigError: too few slots for the experts, or too many on a rank.
    """
    layers = []
    check_room(max(map(len, load_LE)), topology.num_ranks, slots_per_rank)
    for index, load_E in enumerate(load_LE):
        old = previous.layers[index] if previous else None
        layers.append(place_layer(load_E, topology, slots_of(len(load_E), slots_per_rank), old, min_replicas))
    return Placement(slots_per_rank, tuple(layers))


def place_layer(
    load_E: Load,
    topology: EpTopology,
    slots_per_rank: int,
    previous: LayerPlacement | None = None,
    min_replicas: int = 1,
) -> LayerPlacement:
    """One layer of `place`."""
    check_room(len(load_E), topology.num_ranks, slots_per_rank)
    num_slots = topology.num_ranks * slots_per_rank
    least = reachable_copies(min_replicas, len(load_E), num_slots)
    count_E = add_replicas(load_E, np.full(len(load_E), least, dtype=np.int64), num_slots, topology.num_ranks)
    work = WorkingTable(load_E, topology, slots_per_rank, count_E, min_replicas)
    fill(work, count_E, range(topology.num_ranks))
    return finish(cool(work, GOOD_PEAK, num_slots), previous)


def add_replicas(
    load_E: Load,
    count_E: NDArray[np.int64],
    num_slots: int,
    max_count: int | NDArray[np.int64],
    min_count: int = 1,
) -> NDArray[np.int64]:
    """Replicas of each expert when `num_slots` slots are all used: always one more for the largest load / count.

    Args:
        load_E: tokens per expert.
        count_E: replicas that are there already, >= 1.
        num_slots: at least the sum of `count_E`, at most that of `max_count`.
        max_count: of one expert.
        min_count: experts with fewer come first.
    """
    count_E, max_E = count_E.copy(), np.broadcast_to(max_count, count_E.shape)

    def entry(expert: int, count: int) -> tuple[bool, float, int, int]:
        return count >= min_count, -float(load_E[expert]) / count, count, expert

    heap = [entry(expert, count) for expert, count in enumerate(count_E.tolist())]
    heapq.heapify(heap)
    left = num_slots - int(count_E.sum())
    while left:
        *_, count, expert = heapq.heappop(heap)
        if count < max_E[expert]:
            count_E[expert] += 1
            left -= 1
            heapq.heappush(heap, entry(expert, count + 1))
    return count_E


def fill(work: WorkingTable, new_E: NDArray[np.int64], ranks: Iterable[int]) -> None:
    """Put `new_E[e]` replicas of each expert into the empty slots of `ranks`, which are free and exactly so many.

    Heaviest share first, each to a rank that has not got it, in the node with the fewest replicas of it, with the
    least load.
    """
    open_P = np.zeros(len(work.rank_load_P), dtype=bool)
    open_P[list(ranks)] = True
    free_P = np.where(open_P, work.table_Ps.shape[1], 0)
    heaviest_first = np.argsort(-work.share_E, kind="stable")
    for expert in np.repeat(heaviest_first, new_E[heaviest_first]).tolist():
        can_P = (free_P > 0) & ~work.holds_EP[expert]
        if not can_P.any():
            _exchange(work, expert, free_P, open_P)
            continue
        copies_P = work.copies_EN[expert, work.node_of_P]
        can_P &= copies_P == copies_P[can_P].min()
        rank = int(np.where(can_P, work.rank_load_P, np.inf).argmin())
        work.put(rank, -int(free_P[rank]), expert)
        free_P[rank] -= 1


def _exchange(work: WorkingTable, expert: int, free_P: NDArray[np.int64], open_P: NDArray[np.bool_]) -> None:
    """All ranks with free slots hold `expert`: it takes a slot of a full one, whose expert goes to a free one.

    The full rank has more experts besides `expert` than the free one, so one of them is new there.
    """
    free = int(free_P.argmax())
    full = int((open_P & ~work.holds_EP[expert]).argmax())
    experts = work.table_Ps[full]
    index = int((~work.holds_EP[experts, free]).argmax())
    work.put(free, -int(free_P[free]), int(experts[index]))
    free_P[free] -= 1
    work.put(full, index, expert)


def finish(work: WorkingTable, previous: LayerPlacement | None) -> LayerPlacement:
    """The table as a placement; experts that stay on a rank keep their slots of `previous`."""
    table = work.table_Ps.reshape(-1).tolist()
    if previous is None or previous.num_slots != len(table):
        return LayerPlacement(previous.version + 1 if previous else 0, tuple(table))
    size = work.table_Ps.shape[1]
    aligned: list[int] = []
    for rank in range(len(work.table_Ps)):
        old, new = previous.experts_of(rank, size), table[rank * size : (rank + 1) * size]
        arriving = iter([expert for expert in new if expert not in old])
        aligned += [expert if expert in new else next(arriving) for expert in old]
    changed = tuple(aligned) != previous.physical_to_logical
    return LayerPlacement(previous.version + changed, tuple(aligned))
