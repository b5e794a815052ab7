"""Which logical expert every physical slot holds, per layer; slot p lives on rank `p // slots_per_rank`.

Layers may have different numbers of experts (pyramid): `slots_of` says how many slots of a rank each of them has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import ConfigError
from phalanx.parallel.topology import EpTopology

# Shape suffixes: L layers, E logical experts, S physical slots, P ranks.

Load = NDArray[np.float64] | NDArray[np.int64]
"""Tokens per logical expert, (E,); any unit."""


@dataclass(frozen=True)
class LayerPlacement:
    """One layer's table; only `version` and `physical_to_logical` travel, the rest is derived.

    Attributes:
        version: grows by one with every change of this layer's table.
        physical_to_logical: logical expert of each of the S slots; every slot holds one.
    """

    version: int
    physical_to_logical: tuple[int, ...]

    @property
    def num_slots(self) -> int:
        """S."""
        return len(self.physical_to_logical)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.logical_to_physical)

    @cached_property
    def logical_to_physical(self) -> tuple[tuple[int, ...], ...]:
        """Slots of each expert, ascending."""
        slots: list[list[int]] = [[] for _ in range(max(self.physical_to_logical, default=-1) + 1)]
        for slot, expert in enumerate(self.physical_to_logical):
            slots[expert].append(slot)
        return tuple(map(tuple, slots))

    @cached_property
    def num_replicas(self) -> tuple[int, ...]:
        """Live copies of each expert."""
        return tuple(map(len, self.logical_to_physical))

    def missing_copies(self, min_replicas: int) -> int:
        """Copies to be made until every expert has `min_replicas`, or as many as all can have in these slots."""
        least = reachable_copies(min_replicas, self.num_experts, self.num_slots)
        return sum(max(0, least - count) for count in self.num_replicas)

    @cached_property
    def slots(self) -> NDArray[np.int64]:
        """`physical_to_logical` as an array, (S,); read only."""
        array = np.array(self.physical_to_logical, dtype=np.int64)
        array.setflags(write=False)
        return array

    def experts_of(self, rank: int, slots_per_rank: int) -> tuple[int, ...]:
        """Logical experts on a rank, in slot order."""
        return self.physical_to_logical[rank * slots_per_rank : (rank + 1) * slots_per_rank]

    def rank_load(self, load_E: Load, slots_per_rank: int) -> NDArray[np.float64]:
        """(P,) load of each rank when every expert's load divides equally among its replicas."""
        per_slot = (load_E / np.array(self.num_replicas))[self.slots]
        return np.asarray(per_slot.reshape(-1, slots_per_rank).sum(axis=1), dtype=np.float64)

    def balancedness(self, load_E: Load, slots_per_rank: int) -> float:
        """Mean over maximal rank load, in (0, 1]; 1 without load."""
        rank_load = self.rank_load(load_E, slots_per_rank)
        return float(rank_load.mean() / rank_load.max()) if rank_load.max() > 0 else 1.0

    def validate(self, slots_per_rank: int, num_experts: int | None = None, name: str = "placement") -> None:
        """Check that every expert is live and that no rank holds one twice.

        Args:
            slots_per_rank: s; must divide S.
            num_experts: E, where the caller knows it; without it the highest expert that occurs counts as the last.
            name: of this layer, for messages.

        Raises:
            ConfigError: naming the experts and ranks concerned.
        """
        if not self.num_slots or self.num_slots % slots_per_rank:
            raise ConfigError(f"{name}: {self.num_slots} slots are no multiple of {slots_per_rank} slots per rank")
        expected = self.num_experts if num_experts is None else num_experts
        if min(self.physical_to_logical) < 0 or self.num_experts > expected:
            raise ConfigError(f"{name}: slots hold experts outside 0 ... {expected - 1}")
        lost = sorted(set(range(expected)) - set(self.physical_to_logical))
        if lost:
            raise ConfigError(f"{name}: experts {lost[:8]} ({len(lost)} of {expected}) are on no rank")
        for rank in range(self.num_slots // slots_per_rank):
            experts = self.experts_of(rank, slots_per_rank)
            if len(set(experts)) < slots_per_rank:
                twice = sorted({expert for expert in experts if experts.count(expert) > 1})
                raise ConfigError(f"{name}: rank {rank} holds experts {twice} more than once: {list(experts)}")


@dataclass(frozen=True)
class Placement:
    """All MoE layers of one pipeline stage; layers may have different numbers of experts.

    Attributes:
        slots_per_rank: of a layer with as many experts; one with fewer has one slot per expert, see `slots_of`.
        layers: in order.
    """

    slots_per_rank: int
    layers: tuple[LayerPlacement, ...]

    @property
    def num_slots(self) -> int:
        """S of the largest layer."""
        return max((layer.num_slots for layer in self.layers), default=0)

    @property
    def num_ranks(self) -> int:
        """P."""
        return self.layers[0].num_slots // self._size(self.layers[0]) if self.layers else 0

    def validate(self, topology: EpTopology | None = None, num_experts: Sequence[int] | None = None) -> None:
        """Check every layer, and that the tables have one slot range per rank of `topology`.

        Args:
            topology: the ranks it is meant for.
            num_experts: E of each layer; without it an expert above the highest that occurs cannot be missed.

        Raises:
            ConfigError: naming layer, rank and experts.
        """
        num_ranks = self.num_ranks if topology is None else topology.num_ranks
        for index, layer in enumerate(self.layers):
            name = f"placement of MoE layer {index}"
            experts = layer.num_experts if num_experts is None else num_experts[index]
            size = slots_of(experts, self.slots_per_rank)
            if layer.num_slots != num_ranks * size:
                raise ConfigError(f"{name}: {layer.num_slots} slots where {num_ranks * size} are needed")
            layer.validate(size, None if num_experts is None else experts, name)

    def balancedness(self, load_LE: Sequence[Load] | NDArray[np.float64] | NDArray[np.int64]) -> NDArray[np.float64]:
        """(L,) mean over maximal rank load of each layer."""
        pairs = zip(self.layers, load_LE, strict=True)
        return np.array([layer.balancedness(load_E, self._size(layer)) for layer, load_E in pairs])

    def digest(self) -> str:
        """32 hex digits, equal on two ranks if and only if versions and tables are."""
        text = f"{self.slots_per_rank};" + ";".join(f"{x.version}:{x.physical_to_logical}" for x in self.layers)
        return blake2b(text.encode(), digest_size=16).hexdigest()

    def _size(self, layer: LayerPlacement) -> int:
        return slots_of(layer.num_experts, self.slots_per_rank)


def slots_of(num_experts: int, slots_per_rank: int) -> int:
    """Slots per rank of a layer: a rank that has room for all of its experts holds each once, and no empty slots."""
    return min(slots_per_rank, num_experts)


def reachable_copies(min_replicas: int, num_experts: int, num_slots: int) -> int:
    """Copies, each on another rank, that every expert can have at once: `min_replicas`, or floor(S / E) if it is less.

    Ranks never are too few: none holds an expert twice, so s <= E, and floor(P * s / E) <= P.
    """
    return max(1, min(min_replicas, num_slots // num_experts))


def check_room(num_experts: int, num_ranks: int, slots_per_rank: int) -> None:
    """Refuse a number of slots that cannot hold every expert, or must hold one twice on a rank.

    Raises:
        ConfigError: with the numbers and the smallest ones that work.
    """
    if num_ranks * slots_per_rank < num_experts:
        need = -(-num_experts // slots_per_rank)
        raise ConfigError(
            f"{num_ranks} ranks of {slots_per_rank} expert slots hold {num_ranks * slots_per_rank} of {num_experts} "
            f"experts; at least {need} ranks, or {-(-num_experts // num_ranks)} slots per rank, are needed"
        )
    if slots_per_rank > num_experts:
        raise ConfigError(
            f"{slots_per_rank} expert slots per rank for {num_experts} experts: a rank would hold one twice; "
            f"at most {num_experts}"
        )
