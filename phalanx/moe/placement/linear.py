"""Experts in slot order, wrapping around: the placement at start, before any load is known."""

from collections.abc import Sequence

from phalanx.moe.placement.types import LayerPlacement, Load, Placement, check_room, slots_of
from phalanx.parallel.topology import EpTopology


def place(
    load_LE: Sequence[Load],
    topology: EpTopology,
    previous: Placement | None = None,
    *,
    slots_per_rank: int,
    budget: float = 1.0,
    min_replicas: int = 1,
) -> Placement:
    """Slot p holds expert `p mod E`.

    A rank's s <= E consecutive slots are s different experts, so there is never a duplicate.

    Args:
        load_LE: only the number of experts of each layer counts.
        topology: the P ranks.
        previous: gives the versions only.
        budget: not used.
        min_replicas: not used; every expert has floor(S / E) copies at least.
        slots_per_rank: s; P * s >= E in every layer and s <= E in the largest.

    Raises:
        ConfigError: too few slots for the experts, or too many on a rank.
    """
    return linear([len(load_E) for load_E in load_LE], topology.num_ranks, slots_per_rank, previous)


def linear(
    num_experts: Sequence[int], num_ranks: int, slots_per_rank: int, previous: Placement | None = None
) -> Placement:
    """`place` from the number of experts of each layer.

    Raises:
        ConfigError: too few slots for the experts, or too many on a rank.
    """
    layers = []
    check_room(max(num_experts), num_ranks, slots_per_rank)
    for index, experts in enumerate(num_experts):
        version = previous.layers[index].version + 1 if previous else 0
        num_slots = num_ranks * slots_of(experts, slots_per_rank)
        layers.append(LayerPlacement(version, tuple(slot % experts for slot in range(num_slots))))
    return Placement(slots_per_rank, tuple(layers))
