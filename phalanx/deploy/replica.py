"""One incarnation of a replica on Ray: a placement group, an engine actor, a worker actor per rank."""

import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from phalanx.deploy import plan as plans
from phalanx.deploy.actors import EngineActor, EngineOrders, WorkerActor, new_key
from phalanx.deploy.plan import DeploymentPlan
from phalanx.errors import ConfigError, ReplicaLostError
from phalanx.runtime.rank import Bootstrap

PLACEMENT_S = 30.0
ACTOR_S = 120.0
SLICE_S = 1
"""Of a wait while starting; between two of them it may be stopped. Ray takes whole seconds for placement groups."""

LAST_WORDS_S = 1.0
"""After a worker died: how long the engine, which knows who failed first, has to say so."""


class Replica:
    """Starts, watches and ends one incarnation; used by one thread.

    The tensor ranks of a (pp, dp) coordinate are one bundle, so they share a node. The group is top level: Ray kills
    even a stopped actor when its placement group goes, in 0.2 s, while `ray.kill` takes 5 s (reliability.md, 3.4).
    """

    def __init__(self, plan: DeploymentPlan, replica: int, incarnation: int, controller: str) -> None:
        self._plan, self.replica, self.incarnation = plan, replica, incarnation
        self._controller = controller
        self._group: Any = None
        self._engine_run: Any = None
        self._worker_runs: list[Any] = []
        self._actors: list[Any] = []

    def start(self, stopping: threading.Event) -> None:
        """Take the resources and start all actors; the ranks then load on their own.

        Args:
            stopping: set from outside to give up early.

        Raises:
            ConfigError: the cluster has not enough free resources.
            ReplicaLostError: an actor could not be started, or `stopping` is set.
        """
        self._group = place(self._plan, f"phalanx-{self.replica}-{self.incarnation}")
        if not _until(self._group.wait, PLACEMENT_S, stopping):
            raise ConfigError(shortage(self._plan))
        key, orders = new_key(), self._orders()
        engine = self._actor(EngineActor, 0, 0, 0).remote(orders, key)
        self._actors.append(engine)
        asked = engine.address.remote()
        try:
            _until(lambda slice_s: bool(ray.wait([asked], timeout=slice_s)[0]), ACTOR_S, stopping)
            address = ray.get(asked, timeout=0)
        except (RayError, GetTimeoutError) as error:
            raise ReplicaLostError(f"the engine of replica {self.replica} did not start: {describe(error)}") from error
        is_cuda = self._plan.device == "cuda"
        for rank in range(self._plan.parallel.shape.world_size):
            bundle = rank // self._plan.parallel.tensor
            worker = self._actor(WorkerActor, bundle, 0 if is_cuda else 1, 1 if is_cuda else 0).remote()
            self._actors.append(worker)
            self._worker_runs.append(worker.run.remote(Bootstrap(address, key, rank)))
        self._engine_run = engine.run.remote()

    def wait(self, timeout_s: float) -> str | None:
        """None while it runs; the reason of an orderly end.

        Raises:
            ReplicaLostError: the engine or a rank failed; the first failure is in the message.
        """
        done, _ = ray.wait([self._engine_run, *self._worker_runs], timeout=timeout_s)
        if not done:
            return None
        if done[0] != self._engine_run:
            ray.wait([self._engine_run], timeout=LAST_WORDS_S)
        try:
            return str(ray.get(self._engine_run, timeout=0))
        except GetTimeoutError:
            rank = self._worker_runs.index(done[0])
            raise ReplicaLostError(f"rank {rank} ended: {_outcome(done[0])}") from None
        except RayError as error:
            who = "the engine: " if isinstance(error, RayActorError) else ""
            raise ReplicaLostError(who + describe(error)) from error

    def end(self) -> None:
        """Kill every actor and give the resources back; safe to call in any state."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        self._actors = []

    def _orders(self) -> EngineOrders:
        return EngineOrders(
            plan=plans.encode(self._plan),
            replica=self.replica,
            incarnation=self.incarnation,
            controller=self._controller,
        )

    def _actor(self, kind: type, bundle: int, num_cpus: int, num_gpus: int) -> Any:
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        return ray.remote(kind).options(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=strategy,
        )


def describe(error: BaseException) -> str:
    """What a person should read of a Ray error: the cause's own text, not Ray's wrapping."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        cause = error.cause
        return str(cause) if isinstance(cause, ReplicaLostError) else f"{type(cause).__name__}: {cause}"
    if isinstance(error, RayActorError):
        return "the process died (" + str(error).strip().splitlines()[-1].strip() + ")"
    return str(error)


def _until(is_done: Callable[[int], bool], limit_s: float, stopping: threading.Event) -> bool:
    """Ask `is_done(seconds to wait)` again and again; False = not within the limit."""
    deadline = time.monotonic() + limit_s
    while not is_done(SLICE_S):
        if stopping.is_set():
            raise ReplicaLostError("stopped while it was starting")
        if time.monotonic() > deadline:
            return False
    return True


def _outcome(run: Any) -> str:
    try:
        ray.get(run, timeout=0)
    except RayError as error:
        return describe(error)
    return "it returned although the engine runs"


def place(plan: DeploymentPlan, name: str) -> Any:
    """Ask Ray for a replica's placement group; it may have to be waited for."""
    strategy = "PACK" if plan.device == "cuda" else "SPREAD"
    # Ray wants names that no other deployment on the cluster has.
    return placement_group(_bundles(plan), strategy=strategy, name=f"{name}-{secrets.token_hex(4)}")


def shortage(plan: DeploymentPlan) -> str:
    """Why Ray could not place a replica, with what is free."""
    bundles = _bundles(plan)
    kind = next(iter(bundles[0]))
    need = sum(bundle[kind] for bundle in bundles)
    free, total = ray.available_resources().get(kind, 0), ray.cluster_resources().get(kind, 0)
    return (
        f"the Ray cluster has {free:g} of {total:g} {kind} free, the replica needs {need:g} in groups of "
        f"{bundles[0][kind]:g} on one node: free or add nodes, or lower parallel or replicas"
    )


def _bundles(plan: DeploymentPlan) -> list[dict[str, float]]:
    """One per tensor group, whose ranks share a node."""
    kind = "GPU" if plan.device == "cuda" else "CPU"
    return [{kind: float(plan.parallel.tensor)} for _ in range(plan.parallel.pipeline * plan.parallel.data)]
