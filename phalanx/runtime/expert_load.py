"""How much each rank's experts have to do: what status and metrics show. Pure."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from phalanx.moe.placement.types import LayerPlacement
from phalanx.runtime.expert_config import ExpertConfig


def num_single_experts(config: ExpertConfig, placements: Sequence[LayerPlacement]) -> int:
    """Experts, over all MoE layers, that have one copy where a lost rank should cost nothing but its slots; else 0."""
    singles = sum(count == 1 for layer in placements for count in layer.num_replicas)
    return singles if config.min_replicas > 1 else 0


def rank_loads(
    config: ExpertConfig, placements: Sequence[LayerPlacement], loads: Sequence[NDArray[np.int64]]
) -> list[int]:
    """Tokens that met the experts of each rank, over all its layers; stage by stage, ranks in expert-group order.

    Args:
        config: of the expert groups.
        placements: of every MoE layer.
        loads: tokens per logical expert of every MoE layer; those of a replicated expert count in equal parts.
    """
    totals: list[int] = []
    for stage in range(max(config.stage_of) + 1):
        layers = [placements[i].rank_load(loads[i], config.slots_of(i)) for i in config.layers_of(stage)]
        totals += [round(load) for load in np.sum(layers, axis=0)] if layers else []
    return totals
