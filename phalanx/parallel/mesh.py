"""The process mesh: axes pp, dp, tp, outermost first.

    rank = (pp_rank * dp_size + dp_rank) * tp_size + tp_rank

Given at construction to whoever needs it; there is no global context. This file imports no torch, so that a planner
can reason about shapes without it; `rendezvous` builds the meshes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from phalanx.parallel.group import Group
    from phalanx.parallel.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class MeshShape:
    """Sizes of the three axes."""

    pp: int = 1
    dp: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp * self.tp

    def coordinate(self, rank: int) -> "Coordinate":
        """Where a rank stands."""
        return Coordinate(pp=rank // (self.dp * self.tp), dp=rank // self.tp % self.dp, tp=rank % self.tp)

    def rank(self, pp: int, dp: int, tp: int) -> int:
        """The rank at a coordinate; inverse of `coordinate`."""
        return (pp * self.dp + dp) * self.tp + tp


@dataclass(frozen=True, slots=True)
class Coordinate:
    """Position of a rank on each axis."""

    pp: int
    dp: int
    tp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """One rank's view of the mesh; made by `rendezvous.join` or `rendezvous.single`.

    Attributes:
        device: where this rank computes.
        tp: the ranks that share one copy of the weights of a stage and one set of sequences.
        pipeline: the way to the neighbouring stages; None when there is one stage.

    The groups connect the pp x tp ranks of one dp rank (a *unit*) and nobody else, so that units can come and go while
    the others serve. What units exchange for experts goes through a `Membership`.
    """

    shape: MeshShape
    rank: int
    device: "torch.device"
    tp: "Group"
    pipeline: "Pipeline | None" = None
    shutdown: Callable[[], None] | None = None

    @property
    def coordinate(self) -> Coordinate:
        """Position of this rank on each axis."""
        return self.shape.coordinate(self.rank)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank reads token ids."""
        return self.coordinate.pp == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes logits."""
        return self.coordinate.pp == self.shape.pp - 1

    def close(self) -> None:
        """Leave the process groups, at once; the mesh must not be used afterwards.

        Nothing is waited for, so that a rank can leave a broken mesh; `Pipeline.flush` comes first at an orderly end.
        """
        if self.shutdown is not None:
            self.shutdown()
