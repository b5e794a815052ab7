"""Hypothesis: expert groups of any shape, ragged nodes included, and valid placements on them made without a solver."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from phalanx.moe.placement.types import LayerPlacement
from phalanx.parallel.topology import EpTopology


class Group(NamedTuple):
    topology: EpTopology
    num_experts: int
    slots_per_rank: int

    @property
    def num_ranks(self) -> int:
        return self.topology.num_ranks

    @property
    def num_slots(self) -> int:
        return self.num_ranks * self.slots_per_rank


@st.composite
def groups(
    draw: st.DrawFn, max_ranks: int = 7, max_slots: int = 5, redundant: bool | None = None, copies: int = 1
) -> Group:
    """P * s >= copies * E and s <= E; `redundant` True or False for S > E or S = E only."""
    num_ranks = draw(st.integers(2 if redundant else copies, max_ranks))
    slots = draw(st.integers(1, max_slots))
    most = num_ranks * slots // copies
    experts = most if redundant is False else draw(st.integers(slots, most - bool(redundant)))
    names = draw(st.lists(st.sampled_from("abc"), min_size=num_ranks, max_size=num_ranks))
    return Group(EpTopology.of_names(names), experts, slots)


@st.composite
def layers(draw: st.DrawFn, group: Group, version: int = 0) -> LayerPlacement:
    """Any valid placement: a shuffled wrap-around, then random exchanges and overwrites that keep it valid."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    names = rng.permutation(group.num_experts)
    table = [int(names[slot % group.num_experts]) for slot in range(group.num_slots)]
    for _ in range(3 * group.num_slots):
        first, second = rng.integers(group.num_slots, size=2).tolist()
        changed = table.copy()
        if rng.random() < 0.5:
            changed[first], changed[second] = table[second], table[first]
        else:
            changed[first] = int(rng.integers(group.num_experts))
        if is_valid(changed, group):
            table = changed
    return LayerPlacement(version, tuple(table))


def is_valid(table: list[int] | tuple[int, ...], group: Group) -> bool:
    """The definition, independent of the product's check."""
    size = group.slots_per_rank
    ranks = [table[start : start + size] for start in range(0, len(table), size)]
    return set(table) == set(range(group.num_experts)) and all(len(set(experts)) == size for experts in ranks)


@st.composite
def loads(draw: st.DrawFn, num_experts: int) -> NDArray[np.int64]:
    """From none over equal to very uneven."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return (draw(st.sampled_from([0, 1, 100])) * rng.pareto(draw(st.sampled_from([0.5, 3.0])), num_experts)).astype(
        np.int64
    )
