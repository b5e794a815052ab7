"""Placements for more or fewer ranks; `migrate.plan_moves` leads to the first of them. Pure."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from phalanx.errors import ConfigError
from phalanx.moe.placement.spread import add_replicas, fill
from phalanx.moe.placement.types import LayerPlacement, Load
from phalanx.moe.placement.working_table import WorkingTable
from phalanx.parallel.topology import EpTopology


def shrink_target(
    layer: LayerPlacement, topology: EpTopology, survivors: Iterable[int], *, slots_per_rank: int
) -> LayerPlacement:
    """The placement, still on all ranks, in which the survivors hold every expert.

    Only orphans move (experts on no survivor), one slot each; they take the place of experts that stay live on another
    survivor, spread over ranks and nodes. The others' slots are untouched; version + 1 if anything moves.

    Raises:
        ConfigError: the survivors have too few slots; with the numbers.
    """
    kept = sorted(set(survivors))
    if not set(kept) <= set(range(topology.num_ranks)):
        raise ConfigError(f"survivors {kept} are not ranks of the {topology.num_ranks} of this group")
    table = list(layer.physical_to_logical)
    slots = [slot for rank in kept for slot in range(rank * slots_per_rank, (rank + 1) * slots_per_rank)]
    live = Counter(table[slot] for slot in slots)
    orphans = [expert for expert in range(layer.num_experts) if not live[expert]]
    if len(slots) < layer.num_experts:
        raise ConfigError(
            f"{len(kept)} ranks of {slots_per_rank} expert slots hold {len(slots)} of {layer.num_experts} experts; "
            f"at least {-(-layer.num_experts // slots_per_rank)} ranks must stay"
        )
    received: Counter[int] = Counter()

    def cost(slot: int) -> tuple[int, int, int, int]:
        """Receive evenly over ranks, then over nodes; lose what the node, then the group, has most copies of."""
        node = topology.nodes[topology.node_of[slot // slots_per_rank]]
        beside = sum(table[s] == table[slot] for s in slots if s // slots_per_rank in node)
        return received[slot // slots_per_rank], sum(received[r] for r in node), -beside, -live[table[slot]]

    for orphan in orphans:
        slot = min((slot for slot in slots if live[table[slot]] > 1), key=cost)
        live[table[slot]] -= 1
        live[orphan] = 1
        table[slot] = orphan
        received[slot // slots_per_rank] += 1
    return LayerPlacement(layer.version + bool(orphans), tuple(table))


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
    layer: LayerPlacement, num_new: int, slots_per_rank: int, load_E: Load, topology: EpTopology
) -> LayerPlacement:
    """The old table, untouched, and behind it the slots of `num_new` ranks, with replicas of what is loaded most.

    Args:
        layer: valid, of the ranks so far.
        num_new: ranks that come in at the end.
        slots_per_rank: s.
        load_E: tokens per expert; all zero replicates evenly.
        topology: all ranks, the new ones last.

    Raises:
        ConfigError: the topology has not old + new ranks.
    """
    num_old = layer.num_slots // slots_per_rank
    if topology.num_ranks != num_old + num_new:
        raise ConfigError(f"{num_old} ranks and {num_new} new ones are not the {topology.num_ranks} of the topology")
    old_E = np.array(layer.num_replicas)
    count_E = add_replicas(load_E, old_E, topology.num_ranks * slots_per_rank, old_E + num_new)
    work = WorkingTable(load_E, topology, slots_per_rank, count_E)
    for slot, expert in enumerate(layer.physical_to_logical):
        work.put(*divmod(slot, slots_per_rank), expert)
    fill(work, count_E - old_E, range(num_old, topology.num_ranks))
    return LayerPlacement(layer.version + 1, tuple(work.table_Ps.reshape(-1).tolist()))
