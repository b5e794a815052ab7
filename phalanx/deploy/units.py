"""The worker actors of one incarnation, by unit: the pp x tp ranks of a dp rank, which come and go together.

    first units   share the replica's placement group, together with the engine: one bundle per (pp, dp)
    later ones    have a group of their own, or the bundles of a first unit that has left

A bundle of the replica's group cannot be given back alone: what a first unit leaves stays reserved, for the next unit
that comes, until the replica ends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group_table, remove_placement_group

from phalanx.deploy.actors import WorkerActor
from phalanx.deploy.plan import DeploymentPlan
from phalanx.deploy.ray_groups import describe, in_bundle, place, shortage
from phalanx.runtime.rank import Bootstrap


class GrowFailure(NamedTuple):
    """Why ranks that an operation wants will not come."""

    op_id: str
    reason: str


class Ended(NamedTuple):
    """A rank whose program has ended.

    Attributes:
        op_id: of the operation that wanted it; "" for a first unit.
        error: what ended it; "" = it returned, because the engine closed its link.
    """

    rank: int
    op_id: str
    error: str

    @property
    def outcome(self) -> str:
        """In a sentence."""
        return f"rank {self.rank} ended: {self.error or 'it returned although the engine runs'}"


@dataclass(slots=True)
class _Unit:
    """One unit.

    Attributes:
        group: placement group, and the bundle of each stage in it.
        is_first: the group is the replica's.
        op_id: that wanted it; "" for a first unit.
        deadline: by which Ray must have placed the group; None = it has, or this was reported.
    """

    group: Any
    bundles: list[int]
    is_first: bool
    op_id: str = ""
    deadline: float | None = None
    actors: dict[int, Any] = field(default_factory=dict)


class Units:
    """Starts, watches and ends ranks; used by one thread.

    Args:
        plan: of the deployment.
        name: for placement groups.
        group: of the replica, placed already.
        data: dp ranks that it was made for, all of which are started.
        bootstrap: what a rank needs to dial the engine.
    """

    def __init__(
        self, plan: DeploymentPlan, name: str, group: Any, data: int, bootstrap: Callable[[int], Bootstrap]
    ) -> None:
        self._plan, self._name, self._group, self._bootstrap = plan, name, group, bootstrap
        self._units: list[_Unit] = []
        self._runs: dict[Any, int] = {}
        self._vacant: list[list[int]] = []
        pipeline, tensor = plan.parallel.pipeline, plan.parallel.tensor
        for dp_rank in range(data):
            bundles = [stage * data + dp_rank for stage in range(pipeline)]
            ranks = [bundle * tensor + tp_rank for bundle in bundles for tp_rank in range(tensor)]
            self._add(_Unit(group, bundles, is_first=True), ranks)

    @property
    def runs(self) -> list[Any]:
        """What `ray.wait` may wait for: a reference per rank whose end has not been seen."""
        return list(self._runs)

    def grow(self, op_id: str, units: Sequence[Sequence[int]], now: float) -> None:
        """Start units, unless they are there already; Ray may still have to find room for them."""
        for ranks in units:
            if any(rank in unit.actors for unit in self._units for rank in ranks):
                continue
            deadline = now + self._plan.ray.placement_timeout
            # While Ray replaces bundles of a node that is gone, none of the others says whether it is there.
            if self._vacant and _is_placed(self._group):
                unit = _Unit(self._group, self._vacant.pop(), True, op_id)
            else:
                group = place(self._plan, f"{self._name}-rank-{ranks[0]}", 1)
                unit = _Unit(group, list(range(self._plan.parallel.pipeline)), False, op_id, deadline)
            self._add(unit, ranks)

    def end(self, ranks: Sequence[int]) -> None:
        """End ranks that the engine has let go, frozen or not; a unit's resources are free when its last one goes.

        Cost: `ray.kill` takes 5 s on a frozen process, which happens to a first unit only; a group's removal 0.2 s.
        """
        for unit in list(self._units):
            for rank in [rank for rank in unit.actors if rank in ranks]:
                actor = unit.actors.pop(rank)
                if unit.is_first:
                    ray.kill(actor)
            if not unit.actors:
                self._units.remove(unit)
                if unit.is_first:
                    self._vacant.append(unit.bundles)
                else:
                    remove_placement_group(unit.group)
        self._runs = {run: rank for run, rank in self._runs.items() if rank not in ranks}

    def ended(self, run: Any) -> Ended:
        """Which rank's reference is done; it is not among `runs` any more."""
        rank = self._runs.pop(run)
        op_id = next((unit.op_id for unit in self._units if rank in unit.actors), "")
        return Ended(rank, op_id, _error(run))

    def overdue(self, now: float) -> list[GrowFailure]:
        """What Ray has not placed in time; said once."""
        failures = []
        for unit in self._units:
            if unit.deadline is None:
                continue
            if _is_placed(unit.group):
                unit.deadline = None
            elif now > unit.deadline:
                unit.deadline = None
                failures.append(GrowFailure(unit.op_id, shortage(self._plan, 1, "another data-parallel rank")))
        return failures

    def close(self) -> None:
        """End all later units; the first ones go with the replica's group."""
        for unit in self._units:
            if not unit.is_first:
                remove_placement_group(unit.group)
        self._units, self._runs = [], {}

    def _add(self, unit: _Unit, ranks: Sequence[int]) -> None:
        is_cuda = self._plan.device == "cuda"
        for index, rank in enumerate(ranks):
            bundle = unit.bundles[index // self._plan.parallel.tensor]
            kind = in_bundle(WorkerActor, unit.group, bundle, 0 if is_cuda else 1, 1 if is_cuda else 0)
            unit.actors[rank] = actor = kind.remote()
            self._runs[actor.run.remote(self._bootstrap(rank))] = rank
        self._units.append(unit)


def _is_placed(group: Any) -> bool:
    return bool(placement_group_table(group)["state"] == "CREATED")


def _error(run: Any) -> str:
    try:
        ray.get(run, timeout=0)
    except RayError as error:
        return describe(error)
    return ""
