"""Zipf loads, the balancer others use as a baseline, and what our solvers and replica choice reach on both.

Loads are synthetic: expert popularity is a Zipf law in random order, noise a normal factor per expert.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phalanx.moe.placement import incremental, linear, spread
from phalanx.moe.placement.types import LayerPlacement
from phalanx.moe.replicas import Mode, ReplicaTables, select
from phalanx.parallel.topology import EpTopology

NUM_DRAWS = 3
BUDGET = 0.1


class Shape(NamedTuple):
    """A group: E experts and some redundant ones on P ranks in nodes of 8."""

    num_experts: int
    num_ranks: int
    num_redundant: int

    @property
    def slots_per_rank(self) -> int:
        return (self.num_experts + self.num_redundant) // self.num_ranks

    @property
    def topology(self) -> EpTopology:
        return EpTopology.uniform(self.num_ranks // 8, 8)

    def __str__(self) -> str:
        return f"E{self.num_experts} P{self.num_ranks} (+{self.num_redundant})"


SHAPES = (Shape(256, 32, 32), Shape(256, 64, 64), Shape(128, 16, 16))
SKEWS = (0.5, 1.0)
NOISES = (0.1, 0.5)


def zipf(rng: np.random.Generator, num_experts: int, skew: float) -> NDArray[np.float64]:
    """Share of each expert, in random order."""
    weights = rng.permutation(np.arange(1, num_experts + 1) ** -skew)
    return weights / weights.sum()


def noisy(rng: np.random.Generator, load_E: NDArray[np.float64], noise: float) -> NDArray[np.float64]:
    return load_E * np.clip(1 + noise * rng.standard_normal(len(load_E)), 0.05, None)


def eplb(load_E: NDArray[np.float64], num_ranks: int, slots_per_rank: int) -> list[int]:
    """Physical to logical by the global policy of DeepSeek's EPLB, from its description; no other use than to compare.

    Redundant slots go one by one to the largest load per replica; then the heaviest replica goes to the least loaded
    rank with a free slot. Nothing keeps two replicas of an expert off one rank.
    """
    count_E = np.ones(len(load_E), dtype=np.int64)
    for _ in range(num_ranks * slots_per_rank - len(load_E)):
        count_E[(load_E / count_E).argmax()] += 1
    replicas = np.repeat(np.arange(len(load_E)), count_E)
    share = (load_E / count_E)[replicas]
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    rank_load = np.zeros(num_ranks)
    for index in np.argsort(-share, kind="stable"):
        is_full = np.array([len(experts) == slots_per_rank for experts in ranks])
        rank = int(np.where(is_full, np.inf, rank_load).argmin())
        ranks[rank].append(int(replicas[index]))
        rank_load[rank] += share[index]
    return [expert for experts in ranks for expert in experts]


def num_duplicates(table: list[int] | tuple[int, ...], slots_per_rank: int) -> int:
    """Slots that hold an expert their rank has already."""
    ranks = [table[start : start + slots_per_rank] for start in range(0, len(table), slots_per_rank)]
    return sum(len(experts) - len(set(experts)) for experts in ranks)


def num_moved(old: list[int] | tuple[int, ...], new: list[int] | tuple[int, ...], slots_per_rank: int) -> int:
    """Experts that a rank must receive."""
    starts = range(0, len(old), slots_per_rank)
    return sum(len(set(new[s : s + slots_per_rank]) - set(old[s : s + slots_per_rank])) for s in starts)


class Outcome(NamedTuple):
    """Means over the draws of one shape, skew and noise.

    Attributes:
        stale: balancedness of the old placement under the new load.
        incremental, fresh, eplb: balancedness after solving anew; `*_moved` the share of slots received, `*_ms` CPU.
        duplicates: of our solvers, in all draws; `eplb_duplicates` per layer.
    """

    stale: float
    incremental: float
    incremental_moved: float
    incremental_ms: float
    fresh: float
    fresh_moved: float
    fresh_ms: float
    eplb: float
    eplb_moved: float
    eplb_duplicates: float
    duplicates: int


def study(shape: Shape, skew: float, noise: float) -> Outcome:
    """Balance, moves and time after the load changed."""
    draws = [_draw(shape, skew, noise, np.random.default_rng(seed)) for seed in range(NUM_DRAWS)]
    means = np.mean(draws, axis=0).tolist()
    return Outcome(*means[:-1], duplicates=int(sum(draw[-1] for draw in draws)))


def _draw(shape: Shape, skew: float, noise: float, rng: np.random.Generator) -> tuple[float, ...]:
    size, topology, num_slots = shape.slots_per_rank, shape.topology, shape.num_ranks * shape.slots_per_rank
    old_load = zipf(rng, shape.num_experts, skew)
    load = noisy(rng, old_load, noise)
    old = spread.place_layer(old_load, topology, size)
    begin = time.process_time()
    near = incremental.place_layer(load, topology, size, old, int(BUDGET * num_slots))
    middle = time.process_time()
    fresh = spread.place_layer(load, topology, size, old)
    end = time.process_time()
    old_eplb, new_eplb = (eplb(x, shape.num_ranks, size) for x in (old_load, load))
    return (
        old.balancedness(load, size),
        near.balancedness(load, size),
        num_moved(old.physical_to_logical, near.physical_to_logical, size) / num_slots,
        (middle - begin) * 1e3,
        fresh.balancedness(load, size),
        num_moved(old.physical_to_logical, fresh.physical_to_logical, size) / num_slots,
        (end - middle) * 1e3,
        LayerPlacement(0, tuple(new_eplb)).balancedness(load, size),
        num_moved(old_eplb, new_eplb, size) / num_slots,
        num_duplicates(new_eplb, size),
        sum(num_duplicates(layer.physical_to_logical, size) for layer in (old, near, fresh)),
    )


def cells(outcome: Outcome) -> Iterator[tuple[str, str]]:
    """(column, text) of one row of the table."""
    yield "stale", f"{outcome.stale:.3f}"
    yield "incremental", f"{outcome.incremental:.3f}"
    yield "moved", f"{outcome.incremental_moved:.1%}"
    yield "CPU ms", f"{outcome.incremental_ms:.1f}"
    yield "fresh", f"{outcome.fresh:.3f}"
    yield "moved ", f"{outcome.fresh_moved:.0%}"
    yield "CPU ms ", f"{outcome.fresh_ms:.1f}"
    yield "EPLB", f"{outcome.eplb:.3f}"
    yield "moved  ", f"{outcome.eplb_moved:.0%}"
    yield "duplicates", f"{outcome.eplb_duplicates:.1f}"


class Choice(NamedTuple):
    """Copies of a token that leave its node, and hottest over mean rank load."""

    node_copies: float
    peak: float


def choose_replicas(shape: Shape, skew: float, mode: Mode, tokens_per_rank: int = 128, table: str = "spread") -> Choice:
    """Replica choice for tokens with 8 experts each, on the placement of `spread` (or `linear`, or `eplb`)."""
    draws = [_choose(shape, skew, mode, tokens_per_rank, table, seed) for seed in range(NUM_DRAWS)]
    return Choice(*np.mean(draws, axis=0).tolist())


def route(shape: Shape, skew: float, num_tokens: int, seed: int) -> Tensor:
    """(T, 8) int32 experts, drawn without replacement by their Zipf shares."""
    rng = np.random.default_rng(seed)
    logits = np.log(zipf(rng, shape.num_experts, skew)) + rng.gumbel(size=(num_tokens, shape.num_experts))
    return torch.from_numpy(logits).topk(8).indices.to(torch.int32)


def _choose(shape: Shape, skew: float, mode: Mode, tokens_per_rank: int, table: str, seed: int) -> Choice:
    size, topology = shape.slots_per_rank, shape.topology
    topk_ids_TK = route(shape, skew, shape.num_ranks * tokens_per_rank, seed)
    load = torch.bincount(topk_ids_TK.flatten(), minlength=shape.num_experts).double().numpy()
    layer = {
        "spread": lambda: spread.place_layer(load, topology, size),
        "linear": lambda: linear.linear([shape.num_experts], shape.num_ranks, size).layers[0],
        "eplb": lambda: LayerPlacement(0, tuple(eplb(load, shape.num_ranks, size))),
    }[table]()
    tables = ReplicaTables.of(layer, topology, size, "cpu")
    nodes = torch.tensor(topology.node_of)
    rank_load, copies = torch.zeros(shape.num_ranks), 0
    for rank in range(shape.num_ranks):
        own = slice(rank * tokens_per_rank, (rank + 1) * tokens_per_rank)
        key_T = torch.arange(tokens_per_rank) ^ (rank << 40)
        ranks_TK = select(topk_ids_TK[own], tables, rank, key_T, mode).long() // size
        rank_load += torch.bincount(ranks_TK.flatten(), minlength=shape.num_ranks)
        hit_TN = torch.zeros(tokens_per_rank, topology.num_nodes, dtype=torch.bool).scatter_(1, nodes[ranks_TK], True)
        copies += int(hit_TN.sum() - hit_TN[:, topology.node_of[rank]].sum())
    return Choice(copies / len(topk_ids_TK), float(rank_load.max() / rank_load.mean()))
