"""`grpc.health.v1`: open to everybody, answers states only.

""             the process is alive
"inference"    a replica is up and new requests are taken
"model/NAME"   the same for the served model
"""

import asyncio
from collections.abc import AsyncGenerator

import grpc
from grpc_health.v1.health_pb2 import DESCRIPTOR, HealthCheckRequest, HealthCheckResponse

from phalanx.deploy.server import boundary
from phalanx.errors import OverloadedError, UnknownRequestError

MAX_WATCHERS = 64


class Health:
    """State of the service; `publish` is told whenever it may have changed."""

    def __init__(self, model_name: str) -> None:
        names = ("inference", f"model/{model_name}")
        self._states = {"": HealthCheckResponse.SERVING} | dict.fromkeys(names, HealthCheckResponse.NOT_SERVING)
        self._changed = asyncio.Event()
        self._num_watchers = 0

    def handler(self) -> grpc.GenericRpcHandler:
        """The methods, for a gRPC server."""
        methods = {
            "Check": boundary.unary(HealthCheckRequest, self.check),
            "Watch": boundary.stream(HealthCheckRequest, self.watch),
        }
        return grpc.method_handlers_generic_handler(DESCRIPTOR.services_by_name["Health"].full_name, methods)

    def publish(self, is_ready: bool) -> None:
        """Set what depends on a replica being up."""
        state = HealthCheckResponse.SERVING if is_ready else HealthCheckResponse.NOT_SERVING
        if self._states["inference"] == state:
            return
        self._states |= {name: state for name in self._states if name}
        self._changed.set()
        self._changed = asyncio.Event()

    async def check(self, request: HealthCheckRequest, context: grpc.aio.ServicerContext) -> HealthCheckResponse:
        """The state now."""
        if request.service not in self._states:
            raise UnknownRequestError(f"service {request.service!r} is unknown; known: {list(self._states)}")
        return HealthCheckResponse(status=self._states[request.service])

    async def watch(
        self, request: HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[HealthCheckResponse, None]:
        """The state now and whenever it changes."""
        if self._num_watchers >= MAX_WATCHERS:
            raise OverloadedError(f"{MAX_WATCHERS} watchers are connected, no more are taken; poll Check instead")
        self._num_watchers += 1
        try:
            while True:
                changed = self._changed
                unknown = HealthCheckResponse.SERVICE_UNKNOWN
                yield HealthCheckResponse(status=self._states.get(request.service, unknown))
                await changed.wait()
        finally:
            self._num_watchers -= 1
