"""What a user may write in the cluster file: one frozen dataclass per section, one key per field.

`"auto"` survives here; `phalanx/deploy/resolve.py` turns a `ClusterConfig` into a `DeploymentPlan` that has none.
The list of keys is frozen by `tests/deploy/test_config_keys.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from phalanx.deploy.fields import (
    Kind,
    ListOf,
    MapOf,
    address,
    boolean,
    build,
    duration,
    either,
    integer,
    number,
    one_of,
    power_of_two,
    size,
    split_address,
    string,
)
from phalanx.deploy.yaml_source import MAX_BYTES, Complaint, Mark, read_tree, refuse
from phalanx.errors import ConfigError
from phalanx.moe.spec import CapacitySpec
from phalanx.runtime.expert_config import ExpertOptions
from phalanx.runtime.scaling import PREPARING_S

Auto = Literal["auto"]

PRINTABLE = r"[^\x00-\x1f\x7f\ud800-\udfff]{1,4096}"
NAME = string(r"[a-z][a-z0-9_]{0,63}", "a name of lower-case letters, digits and underscores")


def _ray_address() -> Kind:
    host_port = address()

    def parse(value: str) -> str:
        if value not in ("local", "auto"):
            host_port.parse(value.removeprefix("ray://"))
        return value

    return Kind("local, auto, ray://host:port or host:port", parse)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The checkpoint.

    Attributes:
        path: folder of a Hugging Face checkpoint, or `tiny` for the one inside the package.
        dtype: of weights, activations and KV; auto = the checkpoint's.
        name: what clients call the model; auto = the last part of the path.
    """

    path: Annotated[str, string(PRINTABLE, "a path")]
    dtype: Annotated[str, one_of("auto", "float32", "bfloat16", "float16")] = "auto"
    name: Annotated[str, string(PRINTABLE, "a name")] = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """The Ray cluster.

    Attributes:
        address: local = start one on this machine; auto = the running one of this machine; else where its head is.
        nodes: how many nodes the local cluster pretends to have.
        placement_timeout: seconds that Ray may take to find room for a replica, or for a rank that joins it.
    """

    address: Annotated[str, _ray_address()] = "local"
    nodes: Annotated[int, integer(1, 64)] = 1
    placement_timeout: Annotated[float, duration()] = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How one replica is split; its ranks are pipeline x data x tensor.

    Attributes:
        tensor: ranks that share every layer; all on one node.
        pipeline: stages of consecutive layers.
        data: groups with their own sequences and KV.
        stage_layers: layers of each stage; auto = as even as possible.
    """

    tensor: Annotated[int, integer(1, 1024)] = 1
    pipeline: Annotated[int, integer(1, 1024)] = 1
    data: Annotated[int, integer(1, 1024)] = 1
    stage_layers: Annotated[tuple[int, ...] | Auto, ListOf(integer(1, 10_000))] = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of the batch; those of tokens and sequences hold per data-parallel rank.

    Attributes:
        max_batch_tokens: tokens of one step; auto = 8192 on CUDA, 512 on CPU.
        max_sequences: sequences that run at once.
        max_model_len: prompt plus output of one sequence, tokens; auto = what model and KV pool allow.
        max_queue: requests that may wait before new ones are refused.
    """

    max_batch_tokens: Annotated[int | Auto, either(integer(1, 2**20), "auto")] = "auto"
    max_sequences: Annotated[int, integer(1, 2**16)] = 256
    max_model_len: Annotated[int | Auto, either(integer(1, 2**26), "auto")] = "auto"
    max_queue: Annotated[int, integer(0, 2**20)] = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class KvConfig:
    """The KV pool of a rank.

    Attributes:
        gpu_fraction: share of a GPU's memory for weights, workspace and KV together.
        num_blocks: blocks of the pool, the null block included; auto = what fits.
        block_size: tokens per block; auto = 64 on CUDA, 16 on CPU.
        cpu_memory: bytes of host memory for cold blocks; only 0 works in this version.
        prefix_cache: reuse the KV of equal prefixes.
    """

    gpu_fraction: Annotated[float, number(0.0, 1.0)] = 0.9
    num_blocks: Annotated[int | Auto, either(integer(2, 2**31 - 1), "auto")] = "auto"
    block_size: Annotated[int | Auto, either(power_of_two(8, 256), "auto")] = "auto"
    cpu_memory: Annotated[int, size()] = 0
    prefix_cache: Annotated[bool, boolean()] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceConfig:
    """Moving experts to where the load is, while serving.

    Attributes:
        interval_steps: steps between looks at the load; 0 = never.
        max_moved: share of the expert slots that one rebalancing may move.
    """

    interval_steps: Annotated[int, integer(0, 2**31)] = 3000
    max_moved: Annotated[float, number(0.0, 1.0)] = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityConfig:
    """A limit of tokens per expert, counted per request; it makes answers depend on how a prompt is cut into steps.

    Attributes:
        factor: an expert takes at most `ceil(factor * top_k * tokens / experts)` of a request's tokens; off = all.
        min_capacity: at least so many.
        priority: who stays: earlier tokens (fifo), surer tokens (bpr), or larger weights (probs).
        overflow: a choice without room is dropped, or goes to the next best expert.
    """

    factor: Annotated[float | Literal["off"], either(number(0.0, 1024.0), "off")] = "off"
    min_capacity: Annotated[int, integer(1, 2**20)] = 1
    priority: Annotated[Literal["fifo", "bpr", "probs"], one_of("fifo", "bpr", "probs")] = "fifo"
    overflow: Annotated[Literal["drop", "next"], one_of("drop", "next")] = "drop"


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Experts, spread over the data x tensor ranks of each pipeline stage; only for mixture-of-experts models.

    Attributes:
        dispatch: how tokens travel to their experts; auto = the cheapest for each step, by a cost model that is
            calibrated on the cluster's network.
        exact: answers have the same bits whatever the placement of the experts and the dispatcher.
        redundant_experts: expert slots beyond one per expert, for balance and for the loss of a rank.
        node_size: ranks that the two-hop exchange takes for a node; 0 = Ray's nodes.
        on_rank_loss: restart the replica, or shrink: go on without the rank if every expert has another replica.
    """

    dispatch: Annotated[str, one_of("auto", "local", "allgather", "flat", "two_hop")] = "auto"
    exact: Annotated[bool, boolean()] = False
    redundant_experts: Annotated[int, integer(0, 2**16)] = 0
    node_size: Annotated[int, integer(0, 1024)] = 0
    on_rank_loss: Annotated[Literal["restart", "shrink"], one_of("restart", "shrink")] = "restart"
    rebalance: RebalanceConfig = field(default_factory=RebalanceConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)

    @property
    def options(self) -> ExpertOptions:
        """For the engine."""
        limit = self.capacity
        return ExpertOptions(
            dispatch=self.dispatch,
            exact=self.exact,
            redundant_experts=self.redundant_experts,
            node_size=self.node_size,
            on_rank_loss=self.on_rank_loss,
            rebalance_interval=self.rebalance.interval_steps,
            max_moved=self.rebalance.max_moved,
            capacity=None
            if isinstance(limit.factor, str)
            else CapacitySpec(
                factor=limit.factor, min_capacity=limit.min_capacity, priority=limit.priority, overflow=limit.overflow
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The controller.

    Attributes:
        listen: where clients connect (gRPC).
        metrics: where Prometheus scrapes, or off.
        engine_listen: where engines connect; it must be reachable from every node.
        drain: seconds that running requests get before a stop or a restart.
        detach_grace: seconds that a streaming request outlives its client.
        max_message: bytes of the largest gRPC message.
    """

    listen: Annotated[str, address()] = "127.0.0.1:50051"
    metrics: Annotated[str, either(address(), "off")] = "127.0.0.1:9400"
    engine_listen: Annotated[str, address()] = "127.0.0.1:0"
    drain: Annotated[float, duration()] = 60.0
    detach_grace: Annotated[float, duration()] = 10.0
    max_message: Annotated[int, size()] = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersConfig:
    """The rank processes.

    Attributes:
        threads: CPU threads of each; auto = the node's CPUs shared evenly.
    """

    threads: Annotated[int | Auto, either(integer(1, 1024), "auto")] = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The whole file.

    Attributes:
        device: auto = CUDA if any node has a GPU.
        replicas: independent copies of the model.
        kernels: op -> implementation, where the automatic choice is not wanted.
    """

    model: ModelConfig
    ray: RayConfig = field(default_factory=RayConfig)
    device: Annotated[str, one_of("auto", "cuda", "cpu")] = "auto"
    replicas: Annotated[int, integer(1, 1024)] = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    kv: KvConfig = field(default_factory=KvConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    kernels: Annotated[Mapping[str, str], MapOf(NAME, NAME)] = field(default_factory=dict)


class Problem(NamedTuple):
    """Keys that do not go together; the first one is where it is reported."""

    keys: tuple[str, ...]
    sentence: str


def load_config(path: str | Path) -> ClusterConfig:
    """Read a cluster file.

    Raises:
        ConfigError: the file cannot be read, or holds errors; all of them are listed with line and column.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return parse_config(data.decode(), str(path))
    except UnicodeDecodeError as error:
        if len(data) > MAX_BYTES:  # the cut may have split a character
            raise ConfigError(f"{path}: more than {MAX_BYTES} bytes; a cluster file is smaller") from error
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error


def parse_config(text: str, name: str) -> ClusterConfig:
    """Parse the text of a cluster file; `name` stands before each line number in errors.

    Raises:
        ConfigError: lists every error as `name:line:column: key: sentence`.
    """
    complaints: list[Complaint] = []
    tree = read_tree(text, complaints)
    if tree is None and complaints:
        refuse(name, complaints)
    built = build(ClusterConfig, tree, complaints)
    for problem in conflicts(built.value):
        if not built.failed.intersection(problem.keys):
            mark = next((built.marks[key] for key in problem.keys if key in built.marks), Mark(1, 1))
            complaints.append(Complaint(mark, f"{problem.keys[0]}: {problem.sentence}"))
    refuse(name, complaints)
    config: ClusterConfig = built.value
    return config


def conflicts(config: ClusterConfig) -> Iterator[Problem]:
    """What single fields cannot see: keys that contradict each other, and what this version does not do."""
    ray, parallel, server = config.ray, config.parallel, config.server
    if ray.nodes > 1 and ray.address != "local":
        yield Problem(
            ("ray.nodes", "ray.address"),
            f"{ray.nodes} nodes can only be started with address local, not {ray.address!r}; leave nodes out",
        )
    if not 1 <= ray.placement_timeout <= PREPARING_S:  # a scale operation waits no longer
        yield Problem(("ray.placement_timeout",), f"{ray.placement_timeout:g}s is not within 1s and {PREPARING_S:g}s")
    if parallel.stage_layers != "auto" and len(parallel.stage_layers) != parallel.pipeline:
        yield Problem(
            ("parallel.stage_layers", "parallel.pipeline"),
            f"{len(parallel.stage_layers)} entries for {parallel.pipeline} stages; give one per stage, or auto",
        )
    if config.kv.cpu_memory:
        yield Problem(("kv.cpu_memory",), "offload to CPU memory is not implemented in this version; use 0")
    ports: dict[int, str] = {}
    for key in ("listen", "metrics", "engine_listen"):
        value = getattr(server, key)
        port = 0 if value == "off" else split_address(value)[1]
        if port and port in ports:
            yield Problem(
                (f"server.{key}", f"server.{ports[port]}"),
                f"port {port} is also that of server.{ports[port]}; use another one",
            )
        ports.setdefault(port, key)
