"""What an operation makes of the experts: evacuation, and the placements of the generation it leads to. Pure."""

from collections.abc import Sequence

from phalanx.moe.placement.types import LayerPlacement
from phalanx.moe.resize import add_ranks, drop_ranks, shrink_target
from phalanx.parallel.topology import EpTopology
from phalanx.runtime.expert_planner import ExpertPlanner


class NextGeneration:
    """Ranks that stay keep their slots as they are; ranks that join bring theirs.

    Args:
        old, new: units in dp order, before and after.
        planner: of the generation in use. What joins is fixed here, because the new ranks load it.
        tp: ranks of a unit in each stage.
    """

    def __init__(self, old: Sequence[int], new: Sequence[int], planner: ExpertPlanner, tp: int) -> None:
        self._planner, self._per_rank = planner, planner.config.slots_per_rank
        self._kept = [index * tp + i for index, unit in enumerate(old) if unit in new for i in range(tp)]
        num_new = tp * len(set(new) - set(old))
        self._joining: list[tuple[int, ...]] = []
        for placement, load_E in zip(planner.placements, planner.load.load(), strict=True):
            grown = placement
            if num_new:  # the nodes of ranks that are still to come are not known
                topology = EpTopology.uniform(1, placement.num_slots // self._per_rank + num_new)
                grown = add_ranks(placement, num_new, self._per_rank, load_E, topology)
            self._joining.append(grown.physical_to_logical[placement.num_slots :])

    def evacuation(self) -> dict[int, LayerPlacement]:
        """Placements of the generation in use in which the ranks that stay hold every expert; {} = they do."""
        if self.is_evacuated:
            return {}
        stage_of, topologies = self._planner.config.stage_of, self._planner.topologies
        return {
            layer: shrink_target(placement, topologies[stage_of[layer]], self._kept, slots_per_rank=self._per_rank)
            for layer, placement in enumerate(self._planner.placements)
        }

    @property
    def is_evacuated(self) -> bool:
        """Every expert is live on a rank that stays."""
        return not any(self.missing())

    def missing(self) -> list[list[int]]:
        """Per MoE layer the experts that no rank that stays holds."""
        kept = set(self._kept)
        return [
            [
                expert
                for expert, slots in enumerate(placement.logical_to_physical)
                if kept.isdisjoint(slot // self._per_rank for slot in slots)
            ]
            for placement in self._planner.placements
        ]

    def placements(self) -> list[LayerPlacement]:
        """Of the next generation, were it entered now."""
        placements = []
        for placement, joining in zip(self._planner.placements, self._joining, strict=True):
            table = drop_ranks(placement, self._kept, slots_per_rank=self._per_rank).physical_to_logical
            placements.append(LayerPlacement(placement.version + 1, (*table, *joining)))
        return placements
