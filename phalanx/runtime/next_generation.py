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
        self._planner, self._slots_of, least = planner, planner.config.slots_of, planner.config.min_replicas
        self._kept = [index * tp + i for index, unit in enumerate(old) if unit in new for i in range(tp)]
        num_new = tp * len(set(new) - set(old))
        self._min_replicas = 1 if num_new else least  # ranks that join bring second copies
        self._joining: list[tuple[int, ...]] = []
        for layer, (placement, load_E) in enumerate(zip(planner.placements, planner.load.load(), strict=True)):
            grown, size = placement, self._slots_of(layer)
            if num_new:  # the nodes of ranks that are still to come are not known
                topology = EpTopology.uniform(1, placement.num_slots // size + num_new)
                grown = add_ranks(placement, num_new, size, load_E, topology, least)
            self._joining.append(grown.physical_to_logical[placement.num_slots :])

    def evacuation(self) -> dict[int, LayerPlacement]:
        """Placements of the generation in use in which the ranks that stay hold every expert; {} = they do.

        Twice where a rank may be lost at any time, so that the smaller group does not begin with single copies.
        """
        stage_of, placements = self._planner.config.stage_of, self._planner.placements
        targets = {
            layer: shrink_target(
                placement,
                self._planner.topologies[stage_of[layer]],
                self._kept,
                slots_per_rank=self._slots_of(layer),
                min_replicas=self._min_replicas,
            )
            for layer, placement in enumerate(placements)
        }
        return targets if any(target != placements[layer] for layer, target in targets.items()) else {}

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
                if kept.isdisjoint(slot // self._slots_of(layer) for slot in slots)
            ]
            for layer, placement in enumerate(self._planner.placements)
        ]

    def loss(self) -> str:
        """Why the ranks that stay cannot go on alone, how many copies what they lack had, and the way out; "" = can."""
        missing = {layer: gone for layer, gone in enumerate(self.missing()) if gone}
        if not missing:
            return ""
        layer, experts = next(iter(missing.items()))
        placement = self._planner.placements[layer]
        slots = f"{placement.num_slots} expert slots"
        single = [expert for expert in experts if placement.num_replicas[expert] == 1]
        if not single:
            why = "each had more than one copy, all on ranks lost at once"
        elif placement.num_slots < 2 * placement.num_experts:
            why = f"{slots} do not hold all {placement.num_experts} twice: raise moe.redundant_experts, or scale up"
        else:
            why = (
                f"{slots} hold all {placement.num_experts} twice, but {single[:8]} had one copy; a rebalancing makes "
                "the second, unless moe.rebalance.interval_steps is 0"
            )
        return (
            f"no other rank has experts {experts[:8]} of MoE layer {layer} ({len(missing)} layers lack some), so the "
            f"replica restarts; {why}"
        )

    def placements(self) -> list[LayerPlacement]:
        """Of the next generation, were it entered now."""
        placements = []
        for layer, (placement, joining) in enumerate(zip(self._planner.placements, self._joining, strict=True)):
            table = drop_ranks(placement, self._kept, slots_per_rank=self._slots_of(layer)).physical_to_logical
            placements.append(LayerPlacement(placement.version + 1, (*table, *joining)))
        return placements
