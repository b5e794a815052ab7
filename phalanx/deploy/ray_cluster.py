"""The Ray cluster: started on this machine with one or several nodes, or attached to by address."""

import logging
import os
import socket
from typing import Any

import psutil
import ray

from phalanx.deploy.config import RayConfig
from phalanx.deploy.hardware import Hardware, Node
from phalanx.deploy.local_ray import LocalRay
from phalanx.deploy.server.addresses import split_address
from phalanx.errors import ConfigError

NAMESPACE = "phalanx"
DIAL_S = 5.0


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
        self._local: LocalRay | None = None
        address = config.address
        options: dict[str, Any] = {
            "namespace": NAMESPACE,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        # Ray prints a page about every worker that dies to our stdout; the supervisor says it in a line with the cause.
        ray._private.worker._worker_logs_enabled = False
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        if address == "local":
            self._local = LocalRay(config.nodes)
            address = self._local.address
        elif address != "auto":
            _dial(address)
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
            self._local.close()
            self._local = None


def _dial(address: str) -> None:
    # Ray itself goes on trying for minutes.
    try:
        socket.create_connection(split_address(address.removeprefix("ray://")), timeout=DIAL_S).close()
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster answers at ray.address {address!r} ({error}); give the address that `ray start --head` "
            "printed on the head, and make sure that its port is open to this machine"
        ) from error


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
