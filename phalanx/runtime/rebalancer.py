"""Rebalancing as it goes: looks at the load, solves in a thread, and heads for what is worth its bytes."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from phalanx.moe.placement import incremental, spread
from phalanx.moe.placement.types import LayerPlacement, Load, slots_of
from phalanx.parallel.topology import EpTopology
from phalanx.runtime.balance_policy import BalanceConfig, BalancePolicy, LayerView, Proposal
from phalanx.runtime.expert_planner import REPORT_STEPS, ExpertPlanner

BYTES_PER_S = 1e9
"""What a rank is taken to move beside its steps; a rate that any network of a cluster has."""
POOR, FRESH_GAIN = 0.93, 0.03
"""A solve from zero, which moves nearly every slot, is taken where few moves stay below `POOR` and it gains so much."""


class Problem(NamedTuple):
    """One layer's."""

    load_E: Load
    placement: LayerPlacement
    topology: EpTopology


class Rebalancer:
    """Drives a `BalancePolicy`.

    Args:
        planner: whose layers it moves.
    """

    def __init__(self, planner: ExpertPlanner) -> None:
        self._planner, config = planner, planner.config
        balance = BalanceConfig(interval_steps=config.rebalance_interval, row_bytes=config.row_bytes)
        self._policy = BalancePolicy(balance, len(config.num_experts))
        self._next_look = 0
        self._step_s = 0.01
        self._is_forced = False
        self._solving: Future[dict[int, LayerPlacement]] | None = None

    @property
    def is_solving(self) -> bool:
        """A solve is under way, or its answer has not been looked at."""
        return self._solving is not None

    def note_step(self, seconds: float) -> None:
        """A step took so long on a rank."""
        self._step_s += (seconds - self._step_s) / 16

    def enter(self) -> None:
        """Another generation: an answer about the old one is dropped."""
        self._solving = None
        self._next_look = 0  # copies may be missing
        self._policy.enter()

    def force(self) -> None:
        """Solve every layer now, and take whatever cools it; nothing while a solve or a migration runs."""
        if not self.is_solving and not self._planner.is_migrating:
            self._is_forced = True
            self._solve(range(len(self._planner.placements)))

    def tick(self, *, is_scaling: bool) -> None:
        """Take an answer that is there, or look whether a solve is due; once per step."""
        busy = is_scaling or self._planner.is_migrating
        if self._solving is not None:
            if self._solving.done():
                found, self._solving = self._solving.result(), None
                if not busy:
                    self._take(found)
            return
        if not self._planner.config.rebalance_interval or self._planner.num_steps < self._next_look or busy:
            return
        self._next_look = self._planner.num_steps + REPORT_STEPS
        self._policy.observe(self._views())
        layers = self._policy.decide(self._planner.num_steps, busy=False).layers
        if layers:
            self._is_forced = False
            self._solve(layers)

    def _views(self) -> list[LayerView]:
        config, pairs = self._planner.config, zip(self._planner.placements, self._planner.load.load(), strict=True)
        return [
            LayerView(
                layer.balancedness(load_E, config.slots_of(index)),
                float(load_E.mean()),
                layer.missing_copies(config.min_replicas),
            )
            for index, (layer, load_E) in enumerate(pairs)
        ]

    def _solve(self, layers: Sequence[int]) -> None:
        planner, loads = self._planner, self._planner.load.load()
        config, placements = planner.config, planner.placements
        problems = {
            layer: Problem(loads[layer], placements[layer], planner.topologies[config.stage_of[layer]])
            for layer in layers
        }
        pool = ThreadPoolExecutor(1, thread_name_prefix="expert-solver")
        self._solving = pool.submit(solve, problems, config.slots_per_rank, config.max_moved, config.min_replicas)
        pool.shutdown(wait=False)  # ends with the solve

    def _take(self, found: Mapping[int, LayerPlacement]) -> None:
        loads, least, proposals = self._planner.load.load(), self._planner.config.min_replicas, {}
        for layer, new in found.items():
            old, size = self._planner.placements[layer], self._planner.config.slots_of(layer)
            before, after = old.balancedness(loads[layer], size), new.balancedness(loads[layer], size)
            restored = old.missing_copies(least) - new.missing_copies(least)
            proposals[layer] = Proposal(before, after, num_moves(old, new, size), restored)
        taken = self._policy.accept(proposals, self._step_s, BYTES_PER_S)
        restoring = {layer for layer, offer in proposals.items() if offer.num_restored}
        if self._is_forced:
            cooling = {layer for layer, offer in proposals.items() if offer.num_moves and offer.gain > 0}
            taken = tuple(sorted(cooling | restoring))
        if restoring:
            self._next_look = 0  # the next copies follow as soon as these have moved
        self._planner.migrate({layer: found[layer] for layer in taken})


def solve(
    problems: Mapping[int, Problem], slots_per_rank: int, max_moved: float, min_replicas: int = 1
) -> dict[int, LayerPlacement]:
    """A better placement of each layer; runs beside the steps.

    Args:
        problems: by layer.
        slots_per_rank: s of a layer with as many experts.
        max_moved: share of the slots that may change, except where only a fresh solve helps.
        min_replicas: copies that every expert keeps; where some are missing they come first, and only few moves.
    """
    found = {}
    for layer, (load_E, placement, topology) in problems.items():
        size = slots_of(placement.num_experts, slots_per_rank)
        limit = max(2, int(max_moved * placement.num_slots))  # an exchange changes two
        near = incremental.place_layer(load_E, topology, size, placement, limit, min_replicas)
        reached = near.balancedness(load_E, size)
        if reached < POOR and not placement.missing_copies(min_replicas):
            fresh = spread.place_layer(load_E, topology, size, placement, min_replicas)
            if fresh.balancedness(load_E, size) >= reached + FRESH_GAIN:
                near = fresh
        found[layer] = near
    return found


def num_moves(old: LayerPlacement, new: LayerPlacement, slots_per_rank: int) -> int:
    """Experts that some rank must get."""
    ranks = range(old.num_slots // slots_per_rank)
    return sum(len({*new.experts_of(r, slots_per_rank)} - {*old.experts_of(r, slots_per_rank)}) for r in ranks)
