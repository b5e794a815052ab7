"""The Ray cluster: started on this machine with one or several nodes, or attached to by address."""

import contextlib
import logging
import os
import subprocess
import time
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from phalanx.deploy.config import RayConfig
from phalanx.deploy.hardware import Hardware, Node
from phalanx.errors import ConfigError

NAMESPACE = "phalanx"
EXIT_S = 2.0


def local_hardware(num_nodes: int) -> Hardware:
    """This machine as the nodes of a local cluster: each offers all CPUs, GPUs are on the first, memory is shared."""
    import torch

    gpus = torch.cuda.device_count()
    gpu_memory = min((torch.cuda.get_device_properties(index).total_memory for index in range(gpus)), default=0)
    memory = psutil.virtual_memory().total // num_nodes
    return Hardware(
        nodes=tuple(
            Node(
                name=f"local-{index}",
                cpus=os.cpu_count() or 1,
                gpus=gpus if index == 0 else 0,
                gpu_memory_bytes=gpu_memory if index == 0 else 0,
                memory_bytes=memory,
            )
            for index in range(num_nodes)
        )
    )


class RayCluster:
    """A connection of this process to Ray; `close` also ends a cluster that was started here.

    Raises:
        ConfigError: no cluster answers at the address.
    """

    def __init__(self, config: RayConfig) -> None:
        self._local: Cluster | None = None
        address = config.address
        options: dict[str, Any] = {
            "namespace": NAMESPACE,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        # Ray prints a page about every worker that dies to our stdout; the supervisor says it in a line, with the cause.
        ray._private.worker._worker_logs_enabled = False
        if address == "local":
            self._local = _start_local(config.nodes)
            address = self._local.address
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            self.close()
            raise ConfigError(
                f"no Ray cluster answers at ray.address {config.address!r} ({_first_line(error)}); start one with "
                "`ray start --head`, or use `address: local`"
            ) from error

    def hardware(self) -> Hardware:
        """What the live nodes offer, head first.

        Cost: one short task on every node with a GPU, to read its memory size.
        """
        nodes = [node for node in ray.nodes() if node["Alive"]]
        memory = {node["NodeID"]: _gpu_memory(node) for node in nodes if node["Resources"].get("GPU", 0)}
        return Hardware(
            nodes=tuple(
                Node(
                    name=f"{node['NodeManagerAddress']}/{node['NodeID'][:6]}",
                    cpus=int(node["Resources"].get("CPU", 0)),
                    gpus=int(node["Resources"].get("GPU", 0)),
                    gpu_memory_bytes=memory.get(node["NodeID"], 0),
                    memory_bytes=int(node["Resources"].get("memory", 0)),
                )
                for node in sorted(nodes, key=lambda node: "node:__internal_head__" not in node["Resources"])
            )
        )

    def close(self) -> None:
        """Leave the cluster; end it if it was started here."""
        ray.shutdown()
        if self._local is not None:
            _terminate(self._local)
            self._local.shutdown()
            self._local = None


def _start_local(num_nodes: int) -> Cluster:
    # Started from the main thread: the kernel ends these processes when the thread that started them ends.
    node = {"num_cpus": os.cpu_count() or 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node, shutdown_at_exit=True)
    node.pop("include_dashboard")
    for _ in range(num_nodes - 1):
        cluster.add_node(**node, num_gpus=0)
    cluster.wait_for_nodes()
    return cluster


def _terminate(cluster: Cluster) -> None:
    # All at once: `Cluster.shutdown` would give one process after the other a second to end.
    processes = [process for node in cluster.list_all_nodes() for _, process in node.live_processes()]
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + EXIT_S
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


def _gpu_memory(node: dict[str, Any]) -> int:
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)

    def read() -> int:
        import torch

        count = torch.cuda.device_count()
        return min((torch.cuda.get_device_properties(index).total_memory for index in range(count)), default=0)

    # No GPU is taken: with num_gpus=0 Ray would hide them all, so the variable is lifted for this task.
    task = ray.remote(num_cpus=0, runtime_env={"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}})(read)
    return int(ray.get(task.options(scheduling_strategy=strategy).remote(), timeout=60))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
