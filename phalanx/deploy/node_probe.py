"""What `phalanx doctor` asks every Ray node: one short task each."""

import contextlib
import hashlib
import os
import platform
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import phalanx
from phalanx.deploy.ray_groups import describe
from phalanx.deploy.server.addresses import split_address
from phalanx.errors import PhalanxError
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.hf_config import resolve_path

ANSWER_S = 60.0
DIAL_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """What one node says of itself.

    Attributes:
        node: as plans name it: address and the begin of Ray's id.
        address: by which Ray knows it.
        error: why it said nothing; then the rest is empty.
        host, host_address: its name, and what the name means there ("" = nothing).
        versions: library -> version.
        unreachable: why the controller cannot be reached from there; "" = it can.
        checkpoint: digest of config and of every tensor's name, shape and dtype.
        checkpoint_error: why there is none.
        shm_free_bytes: in /dev/shm.
        gpu_free_bytes: of every GPU.
    """

    node: str
    address: str
    error: str = ""
    host: str = ""
    host_address: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    unreachable: str = ""
    checkpoint: str = ""
    checkpoint_error: str = ""
    shm_free_bytes: int = 0
    gpu_free_bytes: tuple[int, ...] = ()


def versions() -> dict[str, str]:
    """Of what must be equal on every node."""
    return {
        "python": platform.python_version(),
        "ray": ray.__version__,
        "torch": str(torch.__version__),
        "phalanx": phalanx.__version__,
    }


def ask_nodes(model_path: str, engine_listen: str) -> list[NodeReport]:
    """The reports of all live nodes of the connected cluster; takes about as long as an `import torch`.

    Args:
        model_path: as in the file.
        engine_listen: where the controller will listen for engines; listened on meanwhile, so that nodes can try it.
    """
    with _listener(engine_listen) as controller:
        nodes = [(node, _ask(node, model_path, controller)) for node in ray.nodes() if node["Alive"]]
        return [_answer(node, asked) for node, asked in nodes]


def _ask(node: dict[str, Any], model_path: str, controller: str) -> Any:
    # A process of its own that ends with the task: reading a GPU's memory leaves a CUDA context behind.
    options: dict[str, Any] = {"num_cpus": 0, "max_calls": 1, "max_retries": 0}
    if node["Resources"].get("GPU", 0):
        # No GPU is taken: with num_gpus=0 Ray would hide them all, so the variable is lifted for this task.
        options["runtime_env"] = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = ray.remote(**options)(_look).options(scheduling_strategy=strategy)
    return task.remote(_name(node), node["NodeManagerAddress"], model_path, controller)


def _answer(node: dict[str, Any], asked: Any) -> NodeReport:
    try:
        report: NodeReport = ray.get(asked, timeout=ANSWER_S)
    except GetTimeoutError:
        error = f"no task ran within {ANSWER_S:.0f} s"
        ray.cancel(asked, force=True)
    except RayError as failure:
        error = describe(failure)
    else:
        return report
    return NodeReport(node=_name(node), address=node["NodeManagerAddress"], error=error)


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerAddress']}/{node['NodeID'][:6]}"


def _look(node: str, address: str, model_path: str, controller: str) -> NodeReport:
    """The task: runs on the node."""
    checkpoint, checkpoint_error = "", ""
    try:
        checkpoint = checkpoint_digest(model_path)
    except (PhalanxError, OSError) as error:
        checkpoint_error = str(error)
    host, host_address = socket.gethostname(), ""
    with contextlib.suppress(OSError):
        host_address = socket.gethostbyname(host)
    devices = range(torch.cuda.device_count())
    return NodeReport(
        node=node,
        address=address,
        host=host,
        host_address=host_address,
        versions=versions(),
        unreachable=_unreachable(controller),
        checkpoint=checkpoint,
        checkpoint_error=checkpoint_error,
        shm_free_bytes=_shm_free_bytes(),
        gpu_free_bytes=tuple(torch.cuda.mem_get_info(device)[0] for device in devices),
    )


def checkpoint_digest(model_path: str) -> str:
    """sha256 over `config.json` and the name, shape and dtype of every tensor: equal for copies of one checkpoint.

    Raises:
        CheckpointError: the folder is not here, or a file is missing, damaged or cut short.
    """
    folder = resolve_path(model_path)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    with Checkpoint(folder) as checkpoint:
        for tensor in checkpoint.tensors():
            digest.update(f"{tensor.path.name} {tensor.key} {tensor.shape} {tensor.dtype}\n".encode())
    return digest.hexdigest()


def _unreachable(controller: str) -> str:
    if not controller:
        return ""
    try:
        socket.create_connection(split_address(controller), timeout=DIAL_S).close()
    except OSError as error:
        return f"{controller} cannot be reached ({error})"
    return ""


def _shm_free_bytes() -> int:
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


@contextlib.contextmanager
def _listener(engine_listen: str) -> Iterator[str]:
    """Listen where the controller will; yields the bound address, "" if it cannot be had (which `ports` tells)."""
    host, port = split_address(engine_listen)
    try:
        server = socket.create_server((host, port))
    except OSError:
        yield ""
        return
    with server:
        yield f"{host}:{server.getsockname()[1]}"
