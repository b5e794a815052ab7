"""A resolved deployment: every choice made, nothing `auto`. What `phalanx plan` prints and every rank is given.

It is a plain tree of frozen dataclasses; `encode` and `decode` turn it into JSON bytes and back. Ranks compare its
`digest` before they serve.
"""

import hashlib
from dataclasses import dataclass

import msgspec

from phalanx.deploy.config import MoeConfig, RayConfig, ServerConfig
from phalanx.errors import ConfigError
from phalanx.parallel.mesh import MeshShape

_encoder = msgspec.json.Encoder(order="deterministic")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """The checkpoint: `path` as the user wrote it; `dtype` of weights, activations and KV; `name` for clients."""

    path: str
    dtype: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """Sizes of the axes and layers of each pipeline stage."""

    tensor: int
    pipeline: int
    data: int
    stage_layers: tuple[int, ...]

    @property
    def shape(self) -> MeshShape:
        """The mesh of one replica."""
        return MeshShape(pp=self.pipeline, dp=self.data, tp=self.tensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerPlan:
    """Limits of a step, per data-parallel rank; `max_queue` of the whole service."""

    max_batch_tokens: int
    max_sequences: int
    max_model_len: int
    max_queue: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPlan:
    """The KV pool, equal on all ranks; block 0 of `num_blocks` is the null block and holds no tokens."""

    gpu_fraction: float
    num_blocks: int
    block_size: int
    cpu_memory: int
    prefix_cache: bool

    @property
    def capacity_tokens(self) -> int:
        """Tokens that one data-parallel rank can hold."""
        return (self.num_blocks - 1) * self.block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersPlan:
    """CPU threads of each rank."""

    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """One rank.

    Attributes:
        node, slot: where the plan seats it; ranks of one (replica, pp, dp) share a node. Ray may swap equal nodes.
        first_layer, end_layer: its half-open range of decoder layers.
        weight_bytes, workspace_bytes, kv_bytes: device memory, estimated before anything is loaded.
        limit_bytes: what the three may take together.
    """

    replica: int
    rank: int
    pp: int
    dp: int
    tp: int
    node: str
    slot: int
    first_layer: int
    end_layer: int
    weight_bytes: int
    workspace_bytes: int
    kv_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentPlan:
    """The whole deployment; the sections are those of the file.

    Attributes:
        device: "cuda" or "cpu".
        ranks: of all replicas, replica by replica.
        checks: one line per division that had to come out even.
    """

    model: ModelPlan
    ray: RayConfig
    device: str
    replicas: int
    parallel: ParallelPlan
    scheduler: SchedulerPlan
    kv: KvPlan
    moe: MoeConfig
    server: ServerConfig
    workers: WorkersPlan
    kernels: dict[str, str]
    ranks: tuple[RankPlan, ...]
    checks: tuple[str, ...]

    @property
    def digest(self) -> str:
        """sha256 of the encoded plan, hex: equal iff the plans are."""
        return hashlib.sha256(encode(self)).hexdigest()


def encode(plan: DeploymentPlan) -> bytes:
    """A plan as canonical JSON; inverse of `decode`."""
    return _encoder.encode(plan)


def decode(data: bytes) -> DeploymentPlan:
    """Parse an encoded plan.

    Raises:
        ConfigError: the bytes are no plan of this version.
    """
    try:
        return msgspec.json.decode(data, type=DeploymentPlan)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"not a deployment plan of this version: {error}") from error
