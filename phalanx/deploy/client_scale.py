"""Scaling as the client sees it, and how it comes from protobuf messages."""

from collections.abc import Sequence
from dataclasses import dataclass

from phalanx.deploy.server import phalanx_pb2 as pb


@dataclass(frozen=True, slots=True)
class StageBytes:
    """Bytes of each rank of a pipeline stage after scaling; a new rank reads `dense` and `experts` from disk."""

    dense: int
    experts: int
    workspace: int
    kv: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaScalePlan:
    """What scaling takes in one replica; fields as in phalanx.proto.

    Attributes:
        refusal: why it cannot be; None = it can.
    """

    replica: int
    old: int
    new: int
    pipeline: int
    tensor: int
    slots_per_rank: int
    num_experts: int
    stages: tuple[StageBytes, ...]
    moved_rows: int
    moved_bytes: int
    refusal: str | None

    @property
    def num_added(self) -> int:
        """Ranks that come."""
        return max(0, self.new - self.old) * self.pipeline * self.tensor

    @property
    def num_removed(self) -> int:
        """Ranks that go."""
        return max(0, self.old - self.new) * self.pipeline * self.tensor

    @property
    def loaded_bytes(self) -> int:
        """What all new ranks read from disk together."""
        per_unit = self.tensor * sum(stage.dense + stage.experts for stage in self.stages)
        return max(0, self.new - self.old) * per_unit


@dataclass(frozen=True, slots=True)
class ScalePlan:
    """What scaling would take; `plan_id` holds until a replica restarts or is scaled."""

    plan_id: str
    replicas: tuple[ReplicaScalePlan, ...]


@dataclass(frozen=True, slots=True)
class ReplicaScale:
    """An operation's part in one replica: from `old` to `new` data-parallel ranks.

    Attributes:
        phase: PREPARING, COMMITTING, DONE or ABORTED.
        detail: why it was aborted.
    """

    replica: int
    old: int
    new: int
    phase: str
    detail: str
    op_id: str


@dataclass(frozen=True, slots=True)
class ScaleOperation:
    """An operation; `phase` is ABORTED if one of its parts was."""

    op_id: str
    data: int
    phase: str
    replicas: tuple[ReplicaScale, ...]

    @property
    def is_over(self) -> bool:
        """Nothing more will happen."""
        return self.phase in ("DONE", "ABORTED")


def target(data: int, replica: int | None, leave: Sequence[str]) -> pb.ScaleTarget:
    """The question."""
    return pb.ScaleTarget(data=data, replica=replica, leave=_names(leave))


def request(
    op_id: str, data: int, replica: int | None, plan_id: str | None, leave: Sequence[str]
) -> pb.ApplyScaleRequest:
    """The order."""
    return pb.ApplyScaleRequest(op_id=op_id, data=data, replica=replica, plan_id=plan_id, leave=_names(leave))


def _names(leave: Sequence[str]) -> Sequence[str]:
    return [leave] if isinstance(leave, str) else leave


def plan(message: pb.ScalePlan) -> ScalePlan:
    """The answer of PlanScale."""
    replicas = []
    for one in message.replicas:
        fields = {field.name: getattr(one, field.name) for field in one.DESCRIPTOR.fields}
        fields["stages"] = tuple(
            StageBytes(stage.dense, stage.experts, stage.workspace, stage.kv) for stage in one.stages
        )
        fields["refusal"] = one.refusal if one.HasField("refusal") else None
        replicas.append(ReplicaScalePlan(**fields))
    return ScalePlan(message.plan_id, tuple(replicas))


def part(message: pb.ReplicaScale) -> ReplicaScale:
    """An operation's part."""
    return ReplicaScale(message.replica, message.old, message.new, message.phase, message.detail, message.op_id)


def operation(message: pb.ScaleOperation) -> ScaleOperation:
    """The answer of ApplyScale."""
    return ScaleOperation(message.op_id, message.data, message.phase, tuple(map(part, message.replicas)))
