"""The `Cluster` service: what runs, and how to bring it to rest."""

from collections import Counter

import grpc

import phalanx
from phalanx.deploy.server import boundary
from phalanx.deploy.server import phalanx_pb2 as pb
from phalanx.deploy.server.shell import Shell
from phalanx.runtime.controller.events import Drain
from phalanx.runtime.controller.replicas import Replica

SERVICE = "phalanx.v1.Cluster"


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
            replicas=[_replica_status(replica) for _, replica in sorted(core.replicas.items())],
        )

    async def drain(self, request: pb.DrainRequest, context: grpc.aio.ServicerContext) -> pb.DrainState:
        """Refuse new jobs, or accept them again."""
        self._shell.handle(Drain(request.undo))
        return pb.DrainState(draining=self._shell.core.is_draining, jobs=self._job_counts())

    def _job_counts(self) -> pb.JobCounts:
        states = Counter(job.state for job in self._shell.core.jobs.values())
        return pb.JobCounts(queued=states["queued"], running=states["running"], finished=states["finished"])


def _replica_status(replica: Replica) -> pb.ReplicaStatus:
    status = pb.ReplicaStatus(
        replica=replica.replica,
        state=replica.state,
        incarnation=replica.incarnation,
        num_jobs=len(replica.jobs),
        error=replica.error,
    )
    if replica.hello is not None:
        status.ranks.extend(replica.hello.ranks)
        status.block_size = replica.hello.block_size
        status.startup_s.update(replica.hello.startup_s)
        status.max_model_len = replica.hello.max_model_len
        status.max_request_tokens = replica.hello.max_request_tokens
        # Block 0 of each pool is the null block and holds no tokens.
        status.num_free_blocks = status.num_total_blocks = (replica.hello.num_blocks - 1) * replica.hello.dp_size
    if replica.heartbeat is not None:
        status.num_running = replica.heartbeat.num_running
        status.num_waiting = replica.heartbeat.num_waiting
        status.num_free_blocks = replica.heartbeat.num_free_blocks
        status.num_total_blocks = replica.heartbeat.num_total_blocks
        status.num_preemptions = replica.heartbeat.num_preemptions
        status.prefix_queries = replica.heartbeat.prefix_queries
        status.prefix_hits = replica.heartbeat.prefix_hits
        status.num_generated_tokens = replica.heartbeat.num_generated_tokens
    return status
