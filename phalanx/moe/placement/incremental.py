"""The default once a placement serves: change few slots, those that cool the hottest rank most."""

from collections.abc import Sequence

from phalanx.moe.placement import spread
from phalanx.moe.placement.cooling import cool
from phalanx.moe.placement.types import LayerPlacement, Load, Placement, slots_of
from phalanx.moe.placement.working_table import WorkingTable
from phalanx.parallel.topology import EpTopology

GOOD_PEAK = 1.02
"""Hottest over mean rank load at which no move is worth its bytes."""


def place(
    load_LE: Sequence[Load],
    topology: EpTopology,
    previous: Placement | None = None,
    *,
    slots_per_rank: int,
    budget: float = 0.1,
    min_replicas: int = 1,
) -> Placement:
    """Improve `previous`, layer by layer, with at most `budget` of each layer's slots changed.

    Args:
        load_LE: tokens per expert of each layer.
        topology: the P ranks.
        previous: valid on this topology; None = a fresh solve by `spread`.
        slots_per_rank: s.
        budget: changed slots over all slots, 0 ... 1.
        min_replicas: copies that every expert keeps; where fewer are left, these come first, then balance. What does
            not fit counts as the most that does, floor(S / E).

    Raises:
        ConfigError: `previous` does not fit the topology; without it, the slots do not fit the experts.
    """
    if previous is None:
        return spread.place(load_LE, topology, slots_per_rank=slots_per_rank, min_replicas=min_replicas)
    previous.validate(topology, [len(load_E) for load_E in load_LE])
    layers = []
    for old, load_E in zip(previous.layers, load_LE, strict=True):
        size, limit = slots_of(len(load_E), slots_per_rank), int(budget * old.num_slots)
        layers.append(place_layer(load_E, topology, size, old, limit, min_replicas))
    return Placement(slots_per_rank, tuple(layers))


def place_layer(
    load_E: Load,
    topology: EpTopology,
    slots_per_rank: int,
    previous: LayerPlacement,
    max_changed: int,
    min_replicas: int = 1,
) -> LayerPlacement:
    """One layer of `place`; at most `max_changed` slots hold another expert than in `previous`."""
    work = WorkingTable.of(previous, load_E, topology, slots_per_rank, min_replicas)
    return spread.finish(cool(work, GOOD_PEAK, max_changed), previous)
