"""The checks of `phalanx doctor`: what would go wrong with a cluster file on its cluster, before anything is loaded.

What is asked of the nodes comes back as `NodeReport`s; the checks on them are pure.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from ray.util.placement_group import remove_placement_group

from phalanx.deploy import replica
from phalanx.deploy.config import ClusterConfig, load_config
from phalanx.deploy.node_probe import NodeReport, Probe, listener, probe_nodes, versions
from phalanx.deploy.plan import DeploymentPlan
from phalanx.deploy.ports import server_problems
from phalanx.deploy.ray_cluster import RayCluster, local_hardware
from phalanx.deploy.resolve import resolve
from phalanx.errors import CheckpointError, ConfigError, PhalanxError
from phalanx.models.hf_config import read_config
from phalanx.models.spec import DecoderConfig
from phalanx.runtime.memory import readable

SEAT_S = 5
MIB = 2**20
SHM_PER_GPU_RANK = 64 * MIB
"""NCCL's buffers between the GPUs of a node; all that Docker gives a container by default is 64 MiB."""

SHM_PER_LOCAL_NODE = 80 * MIB
"""Ray's object store on a node of a local cluster."""


class Check(NamedTuple):
    """One line of the doctor; `fix` says what to do if it is not ok."""

    name: str
    is_ok: bool
    detail: str
    fix: str = ""


Report = Callable[[Check], None]


def examine(path: Path, report: Report) -> bool:
    """Run every check and report each; a check that needs a failed one is left out. True = all are ok.

    Ray tasks run for a moment on every node; no device is held, and nothing is left running.
    """
    failed = []

    def tell(check: Check) -> None:
        report(check)
        if not check.is_ok:
            failed.append(check)

    try:
        config = load_config(path)
        tell(Check("file", True, f"{path} is a valid cluster file"))
        model = read_config(config.model.path)
        tell(Check("model", True, f"{config.model.path} has a configuration that can be served"))
        problems = server_problems(config.server)
        tell(Check("ports", not problems, "; ".join(problems) or "the controller's addresses are free"))
        _examine_cluster(config, model, tell)
    except (ConfigError, CheckpointError) as error:
        tell(Check("ray" if str(error).startswith("no Ray cluster") else "file", False, str(error)))
    return not failed


def _examine_cluster(config: ClusterConfig, model: DecoderConfig, tell: Report) -> None:
    with closing(RayCluster(config.ray)) as cluster:
        hardware = local_hardware(config.ray.nodes) if config.ray.address == "local" else cluster.hardware()
        tell(Check("ray", True, f"{len(hardware.nodes)} nodes at {config.ray.address}"))
        plan = resolve(config, hardware, model)
        tell(Check("layout", True, f"{len(plan.ranks)} ranks, {plan.kv.capacity_tokens} tokens of KV per data rank"))
        tell(_resources(plan))
        with listener(config.server.engine_listen) as controller:
            reports = probe_nodes(Probe(plan.model.path, plan.device, controller))
        for check in node_checks(plan, reports, versions()):
            tell(check)
