"""The internal port: engines and the supervisor dial it; one bidirectional stream of raw frames each.

/phalanx.v1.EngineLink/Connect     frames of phalanx/runtime/frames.py; the first is Hello
/phalanx.v1.EngineLink/Supervise   frames of phalanx/deploy/server/supervise.py; the first is SupervisorHello
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine

import grpc

from phalanx import log
from phalanx.deploy.server import boundary, supervise
from phalanx.deploy.server.links import SERVICE
from phalanx.deploy.server.shell import Outbox, Shell
from phalanx.errors import PhalanxError
from phalanx.runtime import frames
from phalanx.runtime.controller.events import FrameReceived, GrowFailed, ReplicaGone, ReplicaStarting

_logger = log.get("controller")


def engine_link_handler(shell: Shell) -> grpc.GenericRpcHandler:
    """The methods of the internal port."""
    links = EngineLinks(shell)
    methods = {"Connect": boundary.link(links.engine), "Supervise": boundary.link(links.supervisor)}
    return grpc.method_handlers_generic_handler(SERVICE, methods)


class EngineLinks:
    """Carries frames between open streams and the shell."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    async def engine(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        """One engine, from its Hello to the end of its stream."""
        link, outbox = self._shell.open_link()
        error = "the connection was lost"

        async def receive() -> None:
            async for data in requests:
                frame = frames.decode(data)
                if isinstance(frame, frames.Hello):
                    fields = log.fields(replica=frame.replica, incarnation=frame.incarnation, peer=context.peer())
                    _logger.info("engine connected", extra=fields)
                self._shell.handle(FrameReceived(link, frame))

        try:
            await _until_either_ends(receive(), _send(outbox, context))
            error = "the engine ended its stream"
        except PhalanxError as caught:
            error = str(caught)
            raise
        finally:
            self._shell.close_link(link, error)

    async def supervisor(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        """One supervisor, from its hello to the end of its stream."""

        async def receive() -> None:
            async for data in requests:
                self._supervised(supervise.decode(data))

        with self._shell.supervisor() as outbox:
            await _until_either_ends(receive(), _send(outbox, context))

    def _supervised(self, frame: supervise.Frame) -> None:
        match frame:
            case supervise.SupervisorHello(version):
                if version != frames.VERSION:
                    raise frames.WireError(f"supervisor of version {version}; the controller speaks {frames.VERSION}")
            case supervise.ReplicaStarting(replica, incarnation):
                self._shell.handle(ReplicaStarting(replica, incarnation))
            case supervise.ReplicaGone(replica, incarnation, cause, error):
                fields = log.fields(replica=replica, incarnation=incarnation, cause=cause, error=error)
                _logger.warning("replica gone", extra=fields)
                self._shell.handle(ReplicaGone(replica, incarnation, cause, error))
            case supervise.GrowFailed(replica, incarnation, op_id, reason):
                fields = log.fields(replica=replica, incarnation=incarnation, op_id=op_id, error=reason)
                _logger.warning("a rank that was asked for has failed", extra=fields)
                self._shell.handle(GrowFailed(replica, incarnation, op_id, reason))
            case _:
                raise frames.WireError(f"{type(frame).__name__} is a frame of the controller")


async def _send(outbox: Outbox, context: grpc.aio.ServicerContext) -> None:
    while (data := await outbox.get()) is not None:
        await context.write(data)


async def _until_either_ends(*coroutines: Coroutine[None, None, None]) -> None:
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
