"""From a cluster file to a plan and the cluster it was made for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from phalanx.deploy.config import ClusterConfig
from phalanx.deploy.plan import DeploymentPlan
from phalanx.deploy.ray_cluster import RayCluster, local_hardware
from phalanx.deploy.resolve import resolve
from phalanx.models.hf_config import read_config


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan, and the cluster that this process is connected to; None where it was not needed."""

    plan: DeploymentPlan
    cluster: RayCluster | None


@contextmanager
def prepare(
    config: ClusterConfig, *, start_local: bool, on_plan: Callable[[DeploymentPlan], None] = lambda plan: None
) -> Iterator[Prepared]:
    """Resolve a file on its cluster and stay connected; leaving the context ends the connection, and a local cluster.

    A local cluster is this machine, so its plan needs no Ray: a file that cannot work is refused before Ray starts.

    Args:
        config: the file.
        start_local: whether a local cluster is needed at all; otherwise it is only planned.
        on_plan: called with the plan as soon as it is made, before a local cluster starts.

    Raises:
        ConfigError, CheckpointError: the deployment cannot work, or no cluster answers.
    """
    model = read_config(config.model.path)
    if config.ray.address != "local":
        cluster = RayCluster(config.ray)
        try:
            plan = resolve(config, cluster.hardware(), model)
            on_plan(plan)
            yield Prepared(plan, cluster)
        finally:
            cluster.close()
        return
    plan = resolve(config, local_hardware(config.ray.nodes), model)
    on_plan(plan)
    if not start_local:
        yield Prepared(plan, None)
        return
    cluster = RayCluster(config.ray)
    try:
        yield Prepared(plan, cluster)
    finally:
        cluster.close()
