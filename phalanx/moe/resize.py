"""Placements for more or fewer ranks; `migrate.plan_moves` leads to the first of them. Pure."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from phalanx.errors import ConfigError
from phalanx.moe.placement.spread import add_replicas, fill
from phalanx.moe.placement.types import LayerPlacement, Load, reachable_copies
from phalanx.moe.placement.working_table import WorkingTable
from phalanx.parallel.topology import EpTopology


def shrink_target(
    layer: LayerPlacement,
    topology: EpTopology,
    survivors: Iterable[int],
    *,
    slots_per_rank: int,
    min_replicas: int = 1,
) -> LayerPlacement:
    """The placement, still on all ranks, in which the survivors hold every expert `min_replicas` times.

    Only what lacks copies moves, orphans (experts on no survivor) first, one slot per copy; they take the place of
    experts with more copies on survivors than needed, spread over ranks and nodes. The others' slots are untouched;
    version + 1 if anything moves.

    Args:
        layer: valid.
        topology: the ranks now.
        survivors: those that stay.
        slots_per_rank: s.
        min_replicas: where their slots are too few for it, as many as fit everywhere, floor(slots / E).

    Raises:
        ConfigError: the survivors have too few slots; with the numbers.
    """
    kept = sorted(set(survivors))
    if not set(kept) <= set(range(topology.num_ranks)):
        raise ConfigError(f"survivors {kept} are not ranks of the {topology.num_ranks} of this group")
    table = list(layer.physical_to_logical)
    slots = [slot for rank in kept for slot in range(rank * slots_per_rank, (rank + 1) * slots_per_rank)]
    live = Counter(table[slot] for slot in slots)
    if len(slots) < layer.num_experts:
        raise ConfigError(
            f"{len(kept)} ranks of {slots_per_rank} expert slots hold {len(slots)} of {layer.num_experts} experts; "
            f"at least {-(-layer.num_experts // slots_per_rank)} ranks must stay"
        )
    least = reachable_copies(min_replicas, layer.num_experts, len(slots))
    rank_of = [slot // slots_per_rank for slot in range(layer.num_slots)]
    node_of = [topology.node_of[rank] for rank in rank_of]
    holders = {(table[slot], rank_of[slot]) for slot in slots}
    beside = Counter((table[slot], node_of[slot]) for slot in slots)
    received: Counter[tuple[str, int]] = Counter()

    def cost(slot: int) -> tuple[int, int, int, int]:
        """Receive evenly over ranks, then over nodes; lose what the node, then the group, has most copies of."""
        evenly = received["rank", rank_of[slot]], received["node", node_of[slot]]
        return *evenly, -beside[table[slot], node_of[slot]], -live[table[slot]]

    lacking = [e for count in range(least) for e in range(layer.num_experts) if live[e] <= count]
    for expert in lacking:
        # Never empty: another expert has more than `least` copies, so it is on a rank that has not got this one.
        spare = [slot for slot in slots if live[table[slot]] > least and (expert, rank_of[slot]) not in holders]
        slot = min(spare, key=cost)
        for gone, by in ((table[slot], -1), (expert, 1)):
            live[gone] += by
            beside[gone, node_of[slot]] += by
        holders ^= {(table[slot], rank_of[slot]), (expert, rank_of[slot])}
        table[slot] = expert
        received.update((("rank", rank_of[slot]), ("node", node_of[slot])))
    return LayerPlacement(layer.version + bool(lacking), tuple(table))


def drop_ranks(layer: LayerPlacement, survivors: Iterable[int], *, slots_per_rank: int) -> LayerPlacement:
    """The survivors' slots as those of ranks 0, 1, ... of the next generation, in their old order; version + 1.

    Raises:
        ConfigError: an expert is on none of them.
    """
    kept = sorted(set(survivors))
    table = tuple(expert for rank in kept for expert in layer.experts_of(rank, slots_per_rank))
    after = LayerPlacement(layer.version + 1, table)
    after.validate(
        slots_per_rank, layer.num_experts, f"placement without {layer.num_slots // slots_per_rank - len(kept)} ranks"
    )
    return after


def add_ranks(
    layer: LayerPlacement,
    num_new: int,
    slots_per_rank: int,
    load_E: Load,
    topology: EpTopology,
    min_replicas: int = 1,
) -> LayerPlacement:
    """The old table, untouched, and behind it the slots of `num_new` ranks, with replicas of what is loaded most.

    Args:
        layer: valid, of the ranks so far.
        num_new: ranks that come in at the end.
        slots_per_rank: s.
        load_E: tokens per expert; all zero replicates evenly.
        topology: all ranks, the new ones last.
        min_replicas: experts with fewer copies come first; those of the old table count.

    Raises:
        ConfigError: the topology has not old + new ranks.
    """
    num_old = layer.num_slots // slots_per_rank
    if topology.num_ranks != num_old + num_new:
        raise ConfigError(f"{num_old} ranks and {num_new} new ones are not the {topology.num_ranks} of the topology")
    old_E = np.array(layer.num_replicas)
    num_slots = topology.num_ranks * slots_per_rank
    least = reachable_copies(min_replicas, layer.num_experts, num_slots)
    count_E = add_replicas(load_E, old_E, num_slots, old_E + num_new, least)
    work = WorkingTable(load_E, topology, slots_per_rank, count_E)
    for slot, expert in enumerate(layer.physical_to_logical):
        work.put(*divmod(slot, slots_per_rank), expert)
    fill(work, count_E - old_E, range(num_old, topology.num_ranks))
    return LayerPlacement(layer.version + 1, tuple(work.table_Ps.reshape(-1).tolist()))
