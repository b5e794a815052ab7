"""The checks of `phalanx doctor`: what would go wrong with a cluster file on its cluster, before anything is loaded.

What the nodes say of themselves comes as `NodeReport`s; the checks of those are pure.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, TypeVar

from ray.util.placement_group import remove_placement_group

from phalanx.deploy.config import ClusterConfig, load_config
from phalanx.deploy.node_probe import NodeReport, ask_nodes, versions
from phalanx.deploy.plan import DeploymentPlan
from phalanx.deploy.ports import server_problems
from phalanx.deploy.ray_cluster import RayCluster, local_hardware
from phalanx.deploy.ray_groups import place, shortage
from phalanx.deploy.resolve import resolve
from phalanx.errors import PhalanxError
from phalanx.models.hf_config import read_config
from phalanx.models.spec import DecoderConfig
from phalanx.runtime.memory import readable

SEAT_S = 5
SHM_PER_GPU_RANK = 64 * 2**20
"""For NCCL's buffers between the GPUs of a node; all that Docker gives a container by default is 64 MiB."""

SHM_PER_LOCAL_NODE = 80 * 2**20
"""Ray's object store on each node of a local cluster."""

T = TypeVar("T")


class Check(NamedTuple):
    """One line of the doctor; `fix` says what to do if it is not ok and `detail` does not."""

    name: str
    is_ok: bool
    detail: str
    fix: str = ""


Tell = Callable[[Check], None]


def examine(path: Path, tell: Tell) -> None:
    """Run every check and tell each as it ends; a check that builds on a failed one is left out.

    Placement groups and short Ray tasks on every node come and go; no device is held and nothing is left running.
    """
    config = _attempt("file", lambda: load_config(path), f"{path} is a valid cluster file", tell)
    if config is None:
        return
    problems = server_problems(config.server)
    tell(Check("ports", not problems, "\n".join(problems) or "the controller's addresses are free"))
    text = f"{config.model.path} has a configuration that can be served"
    model = _attempt("model", lambda: read_config(config.model.path), text, tell)
    cluster = _attempt("ray", lambda: RayCluster(config.ray), f"connected to {config.ray.address}", tell)
    if cluster is not None:
        with closing(cluster):
            _examine_cluster(config, model, cluster, tell)


def _examine_cluster(config: ClusterConfig, model: DecoderConfig | None, cluster: RayCluster, tell: Tell) -> None:
    reports = ask_nodes(config.model.path, config.server.engine_listen)
    for check in node_checks(config, reports, versions()):
        tell(check)
    if model is None:
        return
    hardware = local_hardware(config.ray.nodes) if config.ray.address == "local" else cluster.hardware()
    text = f"fits on {len(hardware.nodes)} nodes; `phalanx plan` prints how"
    plan = _attempt("layout", lambda: resolve(config, hardware, model), text, tell)
    if plan is not None:
        tell(_resources(plan))
        for check in plan_checks(plan, reports):
            tell(check)


def _attempt(name: str, call: Callable[[], T], detail: str, tell: Tell) -> T | None:
    """The result of `call`, told as a check; None if it is refused."""
    try:
        result = call()
    except PhalanxError as error:
        tell(Check(name, False, str(error)))
        return None
    tell(Check(name, True, detail))
    return result


def _resources(plan: DeploymentPlan) -> Check:
    """Whether Ray places all replicas at once; it is asked, and everything given back."""
    groups = [place(plan, f"phalanx-doctor-{number}") for number in range(plan.replicas)]
    try:
        placed = sum(group.wait(SEAT_S) for group in groups)
        if placed == len(groups):
            return Check("resources", True, f"Ray can place {placed} x {plan.parallel.shape.world_size} ranks")
        return Check("resources", False, f"{placed} of {len(groups)} replicas can be placed: {shortage(plan)}")
    finally:
        for group in groups:
            remove_placement_group(group)


def node_checks(config: ClusterConfig, reports: Sequence[NodeReport], own: Mapping[str, str]) -> Iterator[Check]:
    """What can be said of the nodes without a plan.

    Args:
        config: the file.
        reports: of every live node.
        own: versions of the libraries of this process, which has to agree with the nodes.
    """
    silent = [f"{report.node}: {report.error}" for report in reports if report.error]
    text = f"{len(reports)} nodes run tasks: " + ", ".join(f"{report.node} ({report.host})" for report in reports)
    yield Check("nodes", not silent, "\n".join(silent) or text, "start Ray there from the same environment as here")
    alive = [report for report in reports if not report.error]
    yield _versions(alive, own)
    yield _addresses(alive)
    deaf = [f"{report.node}: {report.unreachable}" for report in alive if report.unreachable]
    yield Check(
        "controller",
        not deaf,
        "\n".join(deaf) or f"every node reaches this machine at {config.server.engine_listen.rpartition(':')[0]}",
        "set server.engine_listen to an address of this machine that every node can reach, and open its port",
    )
    yield _checkpoint(config, alive)


def plan_checks(plan: DeploymentPlan, reports: Sequence[NodeReport]) -> Iterator[Check]:
    """What the planned ranks need of their nodes."""
    alive = [report for report in reports if not report.error]
    yield _shared_memory(plan, alive)
    if plan.device == "cuda":
        yield _gpu_memory(plan, alive)


def _versions(reports: Sequence[NodeReport], own: Mapping[str, str]) -> Check:
    wrong = [
        f"{report.node} has {library} {report.versions.get(library, 'none')}, this process has {version}"
        for report in reports
        for library, version in own.items()
        if report.versions.get(library) != version
    ]
    text = ", ".join(f"{library} {version}" for library, version in own.items())
    return Check(
        "versions", not wrong, "\n".join(wrong) or f"{text} everywhere", "install the same versions everywhere"
    )


def _addresses(reports: Sequence[NodeReport]) -> Check:
    """Ranks on several machines find their network interface by the host name: it must not mean the machine itself."""
    is_one_machine = len({report.host for report in reports}) <= 1
    wrong = [
        f"{report.node}: host name {report.host} means {report.host_address or 'no address'}"
        for report in reports
        if not report.host_address or (not is_one_machine and is_loopback(report.host_address))
    ]
    wrong += [
        f"{report.node}: Ray knows this node by a loopback address"
        for report in reports
        if not is_one_machine and is_loopback(report.address)
    ]
    text = ", ".join(sorted({f"{report.host} = {report.host_address}" for report in reports}))
    fix = "write the machine's address beside its name in /etc/hosts; `ray start --node-ip-address` for Ray"
    return Check("addresses", not wrong, "\n".join(wrong) or text, fix)


def is_loopback(address: str) -> bool:
    """Whether only the machine itself can be reached there."""
    return address.startswith("127.") or address == "::1"


def _checkpoint(config: ClusterConfig, reports: Sequence[NodeReport]) -> Check:
    wrong = [f"{report.node}: {report.checkpoint_error}" for report in reports if report.checkpoint_error]
    fix = "put the same folder at the same path on every node, or share it"
    if wrong:
        return Check("checkpoint", False, "\n".join(wrong), fix)
    digests = Counter(report.checkpoint for report in reports)
    if len(digests) > 1:
        usual = digests.most_common(1)[0][0]
        others = ", ".join(report.node for report in reports if report.checkpoint != usual)
        return Check("checkpoint", False, f"{config.model.path} is another checkpoint on {others}", fix)
    text = f"{config.model.path} is readable and equal on every node (digest {next(iter(digests), '-')[:12]})"
    return Check("checkpoint", True, text)


def _shared_memory(plan: DeploymentPlan, reports: Sequence[NodeReport]) -> Check:
    """Per host: nodes of a local cluster share it."""
    hosts = {report.host: report.shm_free_bytes for report in reports}
    if plan.device == "cuda":
        need = SHM_PER_GPU_RANK * max(Counter(rank.node for rank in plan.ranks).values())
    else:
        need = SHM_PER_LOCAL_NODE * (plan.ray.nodes if plan.ray.address == "local" else 0)
    wrong = [f"{host}: {readable(free)} free, {readable(need)} needed" for host, free in hosts.items() if free < need]
    text = ", ".join(f"{host}: {readable(free)} free" for host, free in hosts.items())
    return Check("/dev/shm", not wrong, "\n".join(wrong) or text, "give the container more, docker run --shm-size=8g")


def _gpu_memory(plan: DeploymentPlan, reports: Sequence[NodeReport]) -> Check:
    """Ray may put any rank on any GPU: each of the GPUs that are needed must hold the largest one."""
    need = max(rank.weight_bytes + rank.workspace_bytes + rank.kv_bytes for rank in plan.ranks)
    free = sorted((free for report in reports for free in report.gpu_free_bytes), reverse=True)
    roomy = sum(each >= need for each in free)
    each = ", ".join(readable(value) for value in free)
    text = f"{roomy} of {len(free)} GPUs have the {readable(need)} free that a rank needs; {len(plan.ranks)} ranks"
    fix = f"end what uses them (free: {each}), or lower kv.gpu_fraction or kv.num_blocks"
    return Check("GPU memory", roomy >= len(plan.ranks), text, fix)
