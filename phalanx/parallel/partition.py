"""Who holds which part of a sharded dim: pure arithmetic, shared by the layers and the planner."""

from typing import NamedTuple

from phalanx.errors import ConfigError


class Part(NamedTuple):
    """`[start, stop)` of a dim of `total` units, the part one rank holds."""

    total: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Units this rank holds."""
        return self.stop - self.start

    def times(self, width: int) -> "Part":
        """The same part counted in elements when a unit is `width` elements wide."""
        return Part(self.total * width, self.start * width, self.stop * width)


def whole(total: int) -> Part:
    """A dim that is not sharded."""
    return Part(total, 0, total)


def shard(what: str, total: int, rank: int, size: int) -> Part:
    """Equal parts.

    Args:
        what: name of the dim, for the message.
        total: units to share.
        rank: on the tensor axis.
        size: of the tensor axis.

    Raises:
        ConfigError: `total` is not divisible by `size`.
    """
    if total % size:
        fits = max(width for width in range(1, size) if total % width == 0)
        raise ConfigError(f"{what} ({total}) is not divisible by parallel.tensor ({size}); use tensor: {fits}")
    return Part(total, rank * total // size, (rank + 1) * total // size)


def shard_or_replicate(what: str, total: int, rank: int, size: int) -> Part:
    """Equal parts while there are enough units, else one unit per rank, each held by `size / total` ranks.

    Raises:
        ConfigError: neither of the two numbers divides the other.
    """
    if size <= total:
        return shard(what, total, rank, size)
    if size % total:
        raise ConfigError(
            f"{what} ({total}) does not divide parallel.tensor ({size}); use tensor: {size // total * total}"
        )
    unit = rank * total // size
    return Part(total, unit, unit + 1)


def padded(total: int, size: int) -> int:
    """`total` rounded up to a multiple of `size`."""
    return -(-total // size) * size


def shard_padded(total: int, rank: int, size: int) -> Part:
    """Equal parts of the padded dim, cut at `total`: the last ranks may hold less, even nothing."""
    width = padded(total, size) // size
    return Part(total, min(rank * width, total), min((rank + 1) * width, total))
