"""One incarnation of a replica on Ray: a placement group, an engine actor, a worker actor per rank."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import remove_placement_group

from phalanx.deploy import plan as plans
from phalanx.deploy.actors import EngineActor, EngineOrders, new_key
from phalanx.deploy.plan import DeploymentPlan
from phalanx.deploy.ray_groups import describe, in_bundle, place, shortage
from phalanx.deploy.units import GrowFailure, Units
from phalanx.errors import ConfigError, ReplicaLostError
from phalanx.runtime.rank import Bootstrap

ACTOR_S = 120.0
SLICE_S = 1
"""Of a wait while starting; between two of them it may be stopped. Ray takes whole seconds for placement groups."""

LAST_WORDS_S = 1.0
"""After a worker died: how long the engine, which knows who failed first, has to say so."""


class Replica:
    """Starts, watches, scales and ends one incarnation; used by one thread.

    The tensor ranks of a (pp, dp) coordinate are one bundle, so they share a node. The group is top level: Ray kills
    even a stopped actor when its placement group goes, in 0.2 s, while `ray.kill` takes 5 s (reliability.md, 3.4).

    Args:
        plan: of the deployment.
        replica, incarnation: who this is.
        controller: where the engine dials.
        data: dp ranks to start with; None = as the plan says.
    """

    def __init__(
        self, plan: DeploymentPlan, replica: int, incarnation: int, controller: str, data: int | None = None
    ) -> None:
        self._plan, self.replica, self.incarnation = plan, replica, incarnation
        self._controller = controller
        self._data = plan.parallel.data if data is None else data
        self._group: Any = None
        self._engine: Any = None
        self._engine_run: Any = None
        self._units: Units | None = None
        self._failures: list[GrowFailure] = []

    def start(self, stopping: threading.Event) -> None:
        """Take the resources and start all actors; the ranks then load on their own.

        Args:
            stopping: set from outside to give up early.

        Raises:
            ConfigError: the cluster has not enough free resources.
            ReplicaLostError: an actor could not be started, or `stopping` is set.
        """
        name = f"phalanx-{self.replica}-{self.incarnation}"
        self._group = place(self._plan, name, self._data)
        if not _until(self._group.wait, self._plan.ray.placement_timeout, stopping):
            raise ConfigError(shortage(self._plan, self._data))
        key, orders = new_key(), self._orders()
        self._engine = in_bundle(EngineActor, self._group, 0, 0, 0).remote(orders, key)
        asked = self._engine.address.remote()
        try:
            _until(lambda slice_s: bool(ray.wait([asked], timeout=slice_s)[0]), ACTOR_S, stopping)
            address = ray.get(asked, timeout=0)
        except (RayError, GetTimeoutError) as error:
            raise ReplicaLostError(f"the engine of replica {self.replica} did not start: {describe(error)}") from error
        self._units = Units(self._plan, name, self._group, self._data, lambda rank: Bootstrap(address, key, rank))
        self._engine_run = self._engine.run.remote()

    def wait(self, timeout_s: float, *, has_served: bool = True) -> str | None:
        """None while it runs; the reason of an orderly end.

        A rank that ends is a failure while the replica starts. Later the engine, which sees it first, decides what it
        means: one that it has let go, or can do without, ends nothing.

        Raises:
            ReplicaLostError: the engine or a rank failed; the first failure is in the message.
        """
        assert self._units is not None, "started"
        done, _ = ray.wait([self._engine_run, *self._units.runs], timeout=timeout_s)
        if not done:
            return None
        if done[0] != self._engine_run:
            ended = self._units.ended(done[0])
            if ended.op_id and ended.error:
                self._failures.append(GrowFailure(ended.op_id, ended.outcome))
            if has_served:
                return None
            if not ray.wait([self._engine_run], timeout=LAST_WORDS_S)[0]:
                raise ReplicaLostError(ended.outcome)
        return self._engine_end()

    def last_words(self) -> str | None:
        """The reason of an orderly end, of an engine that ends by itself within `LAST_WORDS_S`; None = it does not.

        Raises:
            ReplicaLostError: the engine failed, with the first failure.
        """
        return self._engine_end() if ray.wait([self._engine_run], timeout=LAST_WORDS_S)[0] else None

    def grow(self, op_id: str, units: Sequence[Sequence[int]], now: float) -> None:
        """Start further ranks, one sequence per dp rank; `failures` says if they cannot come."""
        assert self._units is not None, "started"
        self._units.grow(op_id, units, now)

    def shed(self, ranks: Sequence[int]) -> None:
        """End ranks that the engine has let go."""
        assert self._units is not None, "started"
        self._units.end(ranks)

    def failures(self, now: float) -> list[GrowFailure]:
        """Ranks asked for with `grow` that will not come, since the last call."""
        assert self._units is not None, "started"
        failures, self._failures = [*self._failures, *self._units.overdue(now)], []
        return failures

    def end(self) -> None:
        """Kill every actor and give the resources back; safe to call in any state."""
        if self._units is not None:
            self._units.close()
            self._units = None
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        self._engine = None

    def _engine_end(self) -> str:
        try:
            return str(ray.get(self._engine_run, timeout=0))
        except RayError as error:
            who = "the engine: " if isinstance(error, RayActorError) else ""
            raise ReplicaLostError(who + describe(error)) from error

    def _orders(self) -> EngineOrders:
        return EngineOrders(
            plan=plans.encode(self._plan),
            replica=self.replica,
            incarnation=self.incarnation,
            data=self._data,
            controller=self._controller,
        )


def _until(is_done: Callable[[int], bool], limit_s: float, stopping: threading.Event) -> bool:
    """Ask `is_done(seconds to wait)` again and again; False = not within the limit."""
    deadline = time.monotonic() + limit_s
    while not is_done(SLICE_S):
        if stopping.is_set():
            raise ReplicaLostError("stopped while it was starting")
        if time.monotonic() > deadline:
            return False
    return True
