"""`grpc.health.v1`: open to everybody, answers states only.

    ""             the process is alive
    "inference"    a replica is up and new requests are taken
    "model/NAME"   the same for the served model
"""

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import SERVICE_NAME
from grpc_health.v1.health import aio as health_aio

from phalanx.deploy.server import boundary

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """State of the service; `publish` is told whenever it may have changed."""

    def __init__(self, model_name: str) -> None:
        self._servicer = health_aio.HealthServicer()
        self._names = ("inference", f"model/{model_name}")
        self._is_ready: bool | None = None

    def handler(self) -> grpc.GenericRpcHandler:
        """The methods, for a gRPC server."""
        request = health_pb2.HealthCheckRequest
        methods = {"Check": boundary.unary(request, self._servicer.Check), "Watch": boundary.stream(request, self._watch)}
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    async def publish(self, is_ready: bool) -> None:
        """Set what depends on a replica being up."""
        if is_ready != self._is_ready:
            self._is_ready = is_ready
            for name in self._names:
                await self._servicer.set(name, SERVING if is_ready else NOT_SERVING)
