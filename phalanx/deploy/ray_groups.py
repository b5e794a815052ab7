"""Placement groups and actors as the deployment uses them, and Ray's errors in a person's words."""

import secrets
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from phalanx.deploy.plan import DeploymentPlan
from phalanx.errors import ReplicaLostError


def place(plan: DeploymentPlan, name: str, data: int | None = None) -> Any:
    """Ask Ray for the placement group of `data` dp ranks (None = all of the plan); it may have to be waited for."""
    strategy = "PACK" if plan.device == "cuda" else "SPREAD"
    # Ray wants names that no other deployment on the cluster has.
    return placement_group(_bundles(plan, data), strategy=strategy, name=f"{name}-{secrets.token_hex(4)}")


def shortage(plan: DeploymentPlan, data: int | None = None, who: str = "the replica") -> str:
    """Why Ray could not place `data` dp ranks (None = all of the plan), with what is free."""
    bundles = _bundles(plan, data)
    kind = next(iter(bundles[0]))
    need = sum(bundle[kind] for bundle in bundles)
    free, total = ray.available_resources().get(kind, 0), ray.cluster_resources().get(kind, 0)
    return (
        f"the Ray cluster has {free:g} of {total:g} {kind} free, {who} needs {need:g} in groups of "
        f"{bundles[0][kind]:g} on one node: free or add nodes, or lower parallel or replicas"
    )


def in_bundle(kind: type, group: Any, bundle: int, num_cpus: int, num_gpus: int) -> Any:
    """A class of actors that run in a bundle and are never restarted by Ray."""
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
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


def _bundles(plan: DeploymentPlan, data: int | None) -> list[dict[str, float]]:
    """One per tensor group, whose ranks share a node: stage by stage, dp rank by dp rank."""
    kind = "GPU" if plan.device == "cuda" else "CPU"
    count = plan.parallel.pipeline * (plan.parallel.data if data is None else data)
    return [{kind: float(plan.parallel.tensor)} for _ in range(count)]
