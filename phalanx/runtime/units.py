"""Which ranks a replica has and where they are.

A unit is the pp x tp ranks of one dp rank; they come and go together.
"""

from collections.abc import Mapping, Sequence

from phalanx.errors import ConfigError
from phalanx.parallel.mesh import Coordinate, MeshShape
from phalanx.parallel.topology import EpTopology
from phalanx.runtime.expert_config import ExpertConfig
from phalanx.runtime.scaling import next_units


class Units:
    """Numbers of units and ranks; each is given once, so a late word of a rank that is gone cannot be mistaken.

    Args:
        shape: of the mesh at the start.
        nodes: name of the node of each rank that has come.
    """

    def __init__(self, shape: MeshShape, nodes: Mapping[int, str]) -> None:
        self._shape, self._nodes = shape, nodes
        self.current = tuple(range(shape.dp))
        self.ranks_of = {
            unit: tuple(shape.rank(pp, unit, tp) for pp in range(shape.pp) for tp in range(shape.tp))
            for unit in self.current
        }
        self._next_rank = shape.world_size

    def of_size(self, target: int, leave: Sequence[str] = ()) -> tuple[int, ...]:
        """The units of another size, in dp order, without those on the nodes to leave; new ones get their ranks here.

        Raises:
            ConfigError: the other nodes have fewer units than that.
        """
        units = self.preview(target, leave)
        size = self._shape.pp * self._shape.tp
        for unit in units:
            if unit not in self.ranks_of:
                self.ranks_of[unit] = tuple(range(self._next_rank, self._next_rank + size))
                self._next_rank += size
        return units

    def preview(self, target: int, leave: Sequence[str] = ()) -> tuple[int, ...]:
        """As `of_size`, but the new ones get no ranks yet."""
        leaving = {unit for unit in self.current if any(self._nodes.get(rank) in leave for rank in self.ranks_of[unit])}
        num_staying = len(self.current) - len(leaving)
        if leaving and target > num_staying:
            raise ConfigError(
                f"data {target}: only {num_staying} of {len(self.current)} data-parallel ranks are not on "
                f"{', '.join(leave)}; {f'use {num_staying} or less, or ' if num_staying else ''}scale up before"
            )
        return next_units(self.current, target, len(self.ranks_of), leaving)

    @property
    def names(self) -> list[str]:
        """Of the nodes with ranks in use."""
        return sorted({self._nodes.get(rank, "") for unit in self.current for rank in self.ranks_of[unit]})

    def unit_of(self, rank: int) -> int:
        """The unit that has ever had a rank."""
        return next(unit for unit, ranks in self.ranks_of.items() if rank in ranks)

    def place_of(self, rank: int, units: Sequence[int]) -> Coordinate:
        """Position of a rank in the mesh of these units."""
        unit = self.unit_of(rank)
        index, tp = self.ranks_of[unit].index(rank), self._shape.tp
        return Coordinate(pp=index // tp, dp=units.index(unit), tp=index % tp)

    def nodes(self, stage: int, units: Sequence[int], experts: ExpertConfig) -> list[str]:
        """Node of each rank of a stage's expert group; those of ranks that are still to come do not matter yet."""
        tp = self._shape.tp
        ranks = [self.ranks_of[unit][stage * tp + i] for unit in units for i in range(tp)]
        return experts.node_names([self._nodes.get(rank, "") for rank in ranks])

    def topologies(self, units: Sequence[int], experts: ExpertConfig) -> list[EpTopology]:
        """Of the expert group of each stage."""
        return [EpTopology.of_names(self.nodes(stage, units, experts)) for stage in range(self._shape.pp)]
