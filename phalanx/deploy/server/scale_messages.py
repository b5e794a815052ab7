"""Scaling as protobuf messages."""

import hashlib
from collections.abc import Mapping, Sequence

from phalanx.deploy.server import phalanx_pb2 as pb
from phalanx.runtime.controller.scale import ReplicaScale, ScaleOperation
from phalanx.runtime.frames import ScaleEstimate


def plan(leave: Sequence[str], estimates: Mapping[int, tuple[int, ScaleEstimate]]) -> pb.ScalePlan:
    """The answer to PlanScale.

    The plan's id names nodes to leave, incarnations, sizes and generations, but not the placement of the experts: a
    balancer changes that every few thousand steps, and what a plan is about stays the same.

    Args:
        leave: nodes on which no rank shall stay.
        estimates: replica -> (incarnation, what its engine said).
    """
    named = [
        (number, incarnation, estimate.generation, estimate.old, estimate.new)
        for number, (incarnation, estimate) in sorted(estimates.items())
    ]
    message = pb.ScalePlan(plan_id=hashlib.sha256(repr((list(leave), named)).encode()).hexdigest()[:16])
    for number, (_, estimate) in sorted(estimates.items()):
        message.replicas.append(_replica_plan(number, estimate))
    return message


def operation(known: ScaleOperation) -> pb.ScaleOperation:
    """All of an operation."""
    parts = [part(one, known.op_id) for _, one in sorted(known.parts.items())]
    return pb.ScaleOperation(op_id=known.op_id, data=known.data, phase=known.phase, replicas=parts)


def part(known: ReplicaScale, op_id: str) -> pb.ReplicaScale:
    """An operation's part in one replica."""
    return pb.ReplicaScale(
        replica=known.replica, old=known.old, new=known.new, phase=known.phase, detail=known.detail, op_id=op_id
    )


def _replica_plan(number: int, estimate: ScaleEstimate) -> pb.ReplicaScalePlan:
    message = pb.ReplicaScalePlan(
        replica=number,
        old=estimate.old,
        new=estimate.new,
        pipeline=estimate.pp,
        tensor=estimate.tp,
        slots_per_rank=estimate.slots_per_rank,
        num_experts=estimate.num_experts,
        moved_rows=estimate.moved_rows,
        moved_bytes=estimate.moved_bytes,
        refusal=estimate.refusal or None,
    )
    for stage in estimate.stages:
        message.stages.add(dense=stage.dense, experts=stage.experts, workspace=stage.workspace, kv=stage.kv)
    return message
