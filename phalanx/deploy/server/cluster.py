"""The `Cluster` service: what runs, how to bring it to rest, and how to scale it."""

import asyncio
from collections import Counter

import grpc
import msgspec

import phalanx
from phalanx.deploy.server import boundary, scale_messages
from phalanx.deploy.server import phalanx_pb2 as pb
from phalanx.deploy.server.shell import Shell
from phalanx.errors import ConfigError, InvalidRequestError, UnavailableError
from phalanx.runtime.controller.events import ApplyScale, Drain
from phalanx.runtime.controller.replicas import Replica
from phalanx.runtime.controller.scale import MAX_DATA, Scaling

SERVICE = "phalanx.v1.Cluster"

ANSWER_S = 10.0
"""An engine answers between two steps."""


class Cluster:
    """Handlers of the service; one per process."""

    def __init__(self, shell: Shell, model_name: str) -> None:
        self._shell = shell
        self._model_name = model_name

    def handler(self) -> grpc.GenericRpcHandler:
        """The methods, for a gRPC server."""
        methods = {
            "Status": boundary.unary(pb.StatusRequest, self.status),
            "Drain": boundary.unary(pb.DrainRequest, self.drain),
            "PlanScale": boundary.unary(pb.ScaleTarget, self.plan_scale),
            "ApplyScale": boundary.unary(pb.ApplyScaleRequest, self.apply_scale),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def status(self, request: pb.StatusRequest, context: grpc.aio.ServicerContext) -> pb.ClusterState:
        """Replicas, jobs, version."""
        core = self._shell.core
        return pb.ClusterState(
            version=phalanx.__version__,
            model=self._model_name,
            draining=core.is_draining,
            jobs=self._job_counts(),
            replicas=[_replica_status(replica, core.scaling) for _, replica in sorted(core.replicas.items())],
        )

    async def drain(self, request: pb.DrainRequest, context: grpc.aio.ServicerContext) -> pb.DrainState:
        """Refuse new jobs, or accept them again."""
        self._shell.handle(Drain(request.undo))
        return pb.DrainState(draining=self._shell.core.is_draining, jobs=self._job_counts())

    async def plan_scale(self, request: pb.ScaleTarget, context: grpc.aio.ServicerContext) -> pb.ScalePlan:
        """Ask every engine that is meant."""
        chosen = (request.replica,) if request.HasField("replica") else ()
        return await self._plan(request.data, chosen, _nodes(request))

    async def apply_scale(self, request: pb.ApplyScaleRequest, context: grpc.aio.ServicerContext) -> pb.ScaleOperation:
        """Begin an operation, or find it; what cannot be is refused before anything starts."""
        chosen, leave = (request.replica,) if request.HasField("replica") else (), _nodes(request)
        scaling = self._shell.core.scaling
        if scaling.find(request.op_id) is None and scaling.running is None:
            plan = await self._plan(request.data, chosen, leave)
            refusals = [f"replica {part.replica}: {part.refusal}" for part in plan.replicas if part.HasField("refusal")]
            if refusals:
                raise ConfigError("\n".join(refusals))
            if request.HasField("plan_id") and request.plan_id != plan.plan_id:
                raise ConfigError(f"plan {request.plan_id} is outdated, {plan.plan_id} holds now; plan again")
        self._shell.handle(ApplyScale(request.op_id, request.data, chosen, leave))
        operation = scaling.find(request.op_id)
        assert operation is not None, "it was just applied"
        return scale_messages.operation(operation)

    async def _plan(self, data: int, chosen: tuple[int, ...], leave: tuple[str, ...]) -> pb.ScalePlan:
        if not 1 <= data <= MAX_DATA:
            raise InvalidRequestError(f"data ({data}) must be 1 to {MAX_DATA}")
        replicas = self._shell.core.replicas
        numbers = chosen or tuple(sorted(replicas))
        if not numbers:
            raise UnavailableError("no replica is up yet; retry later")
        estimates = await asyncio.gather(*(self._shell.ask_scale(number, data, leave, ANSWER_S) for number in numbers))
        known = {node for estimate in estimates for node in estimate.nodes}
        if strange := set(leave) - known:
            refusal = f"leave {min(strange)}: no rank is there; ranks are on {', '.join(sorted(known))}"
            estimates = [msgspec.structs.replace(estimate, refusal=refusal) for estimate in estimates]
        return scale_messages.plan(
            leave,
            {number: (replicas[number].incarnation, answer) for number, answer in zip(numbers, estimates, strict=True)},
        )

    def _job_counts(self) -> pb.JobCounts:
        states = Counter(job.state for job in self._shell.core.jobs.values())
        return pb.JobCounts(queued=states["queued"], running=states["running"], finished=states["finished"])


def _nodes(request: pb.ScaleTarget | pb.ApplyScaleRequest) -> tuple[str, ...]:
    """To leave; in one order, so that the same nodes are the same operation."""
    return tuple(sorted(set(request.leave)))


def _replica_status(replica: Replica, scaling: Scaling) -> pb.ReplicaStatus:
    status = pb.ReplicaStatus(
        replica=replica.replica,
        state=replica.state,
        incarnation=replica.incarnation,
        num_jobs=len(replica.jobs),
        error=replica.error,
    )
    operation = scaling.running
    if operation is not None and replica.replica in operation.parts:
        status.scale.CopyFrom(scale_messages.part(operation.parts[replica.replica], operation.op_id))
    if replica.hello is not None:
        status.ranks.extend(replica.ranks)
        status.data = replica.data
        status.block_size = replica.hello.block_size
        status.startup_s.update(replica.hello.startup_s)
        status.max_model_len = replica.hello.max_model_len
        status.max_request_tokens = replica.hello.max_request_tokens
        # Block 0 of each pool is the null block and holds no tokens.
        status.num_free_blocks = status.num_total_blocks = (replica.hello.num_blocks - 1) * replica.data
    if replica.heartbeat is not None:
        status.num_running = replica.heartbeat.num_running
        status.num_waiting = replica.heartbeat.num_waiting
        status.num_free_blocks = replica.heartbeat.num_free_blocks
        status.num_total_blocks = replica.heartbeat.num_total_blocks
        status.num_preemptions = replica.heartbeat.num_preemptions
        status.prefix_queries = replica.heartbeat.prefix_queries
        status.prefix_hits = replica.heartbeat.prefix_hits
        status.num_generated_tokens = replica.heartbeat.num_generated_tokens
        status.expert_load.extend(replica.heartbeat.expert_load)
        status.num_dropped, status.num_moved = replica.heartbeat.num_dropped, replica.heartbeat.num_moved
        status.num_single_experts = replica.heartbeat.num_single_experts
    return status
