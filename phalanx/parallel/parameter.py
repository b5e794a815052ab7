"""A weight of one rank that knows which parts of which checkpoint tensors it is made of."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from phalanx.parallel.partition import Part, whole

WHOLE = "whole"
"""Segment name of a parameter that is one tensor on disk."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One tensor on disk, or one of several stacked along dim 0 (fused qkv), and where this rank's part of it goes.

    Attributes:
        shape: of the whole segment, all ranks together.
        dim: the sharded dim.
        part: what this rank holds of that dim.
        offset: where the part begins in the parameter's `dim`.
    """

    shape: tuple[int, ...]
    dim: int
    part: Part
    offset: int = 0

    def index(self, base: int = 0) -> tuple[slice, ...]:
        """What to read from a tensor on disk in which this segment begins at row `base`."""
        bounds = [(0, length) for length in self.shape]
        bounds[self.dim] = (self.part.start, self.part.stop)
        bounds[0] = (bounds[0][0] + base, bounds[0][1] + base)
        return tuple(slice(start, stop) for start, stop in bounds)


class Parameter:
    """A tensor of this rank, filled segment by segment; rows that no segment covers (padding) stay 0.

    Args:
        shape: of the local tensor.
        segments: name -> where it lands.
        unit_offset: the checkpoint holds `w - 1`; 1 is added in the parameter's own dtype.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        segments: Mapping[str, Segment],
        *,
        dtype: torch.dtype,
        device: torch.device,
        unit_offset: bool = False,
    ) -> None:
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.segments = segments
        self._unit_offset = unit_offset
        self._filled: set[str] = set()

    @property
    def missing(self) -> tuple[str, ...]:
        """Segments that nobody filled yet."""
        return tuple(name for name in self.segments if name not in self._filled)

    def fill(self, name: str, value: Tensor) -> bool:
        """Copy this rank's part of a segment in, converting dtype and device.

        Returns:
            False if the segment was filled before with other values (a tied weight stored twice); nothing changes then.
        """
        segment = self.segments[name]
        place = self.tensor.narrow(segment.dim, segment.offset, segment.part.size)
        if name in self._filled:
            return torch.equal(place, value.to(place.device, place.dtype) + int(self._unit_offset))
        place.copy_(value)
        if self._unit_offset:
            place += 1
        self._filled.add(name)
        return True


def replicated(
    shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device, unit_offset: bool = False
) -> Parameter:
    """A parameter that every rank holds whole."""
    segments = {WHOLE: Segment(shape, 0, whole(shape[0]))}
    return Parameter(shape, segments, dtype=dtype, device=device, unit_offset=unit_offset)


def sharded_vector(part: Part, *, dtype: torch.dtype, device: torch.device, unit_offset: bool = False) -> Parameter:
    """A vector of which this rank holds a part."""
    segments = {WHOLE: Segment((part.total,), 0, part)}
    return Parameter((part.size,), segments, dtype=dtype, device=device, unit_offset=unit_offset)
