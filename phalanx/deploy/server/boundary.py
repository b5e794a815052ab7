"""Where gRPC ends: bytes become messages, errors become statuses, and nothing else gets out.

Handlers are registered without a deserializer, because gRPC answers a message it cannot parse with UNKNOWN and the
name of a Python class. Unhandled errors leak their repr the same way; here they become INTERNAL and an incident id
that is in the log.
"""

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from phalanx import log
from phalanx.errors import InvalidRequestError, OverloadedError, PhalanxError

RETRY_S = 1.0

_logger = log.get("server")

Unary = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Message]]
Stream = Callable[[Any, grpc.aio.ServicerContext], AsyncGenerator[Message, None]]
Link = Callable[[AsyncIterator[bytes], grpc.aio.ServicerContext], Awaitable[None]]


def unary(request_type: type[Message], handler: Unary) -> grpc.RpcMethodHandler:
    """A unary method: `handler(message, context) -> message`."""

    async def call(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        async with _boundary(context):
            reply = await handler(_parse(request_type, data), context)
        return bytes(reply.SerializeToString())

    return grpc.unary_unary_rpc_method_handler(call)


def stream(request_type: type[Message], handler: Stream) -> grpc.RpcMethodHandler:
    """A method that answers with a stream: `handler` is an async generator of messages."""

    async def call(data: bytes, context: grpc.aio.ServicerContext) -> None:
        # Closed at once, not when it is collected: the end of the generator is what tells the core of a reader's end.
        async with _boundary(context), aclosing(handler(_parse(request_type, data), context)) as chunks:
            async for chunk in chunks:
                await context.write(chunk.SerializeToString())

    return grpc.unary_stream_rpc_method_handler(call)


def link(handler: Link) -> grpc.RpcMethodHandler:
    """A method of raw bytes in both directions."""

    async def call(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        async with _boundary(context):
            await handler(requests, context)

    return grpc.stream_stream_rpc_method_handler(call)


@asynccontextmanager
async def _boundary(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except PhalanxError as error:
        retry_s = None
        if error.retry == "later":
            retry_s = error.retry_after_s if isinstance(error, OverloadedError) else RETRY_S
        await _abort(context, error.status, str(error), retry_s)
    except Exception as error:
        incident = uuid.uuid4().hex[:12]
        _logger.error("internal error", exc_info=error, extra=log.fields(incident=incident))
        await _abort(context, "INTERNAL", f"internal error; incident {incident} is in the controller's log", None)


def _parse(request_type: type[Message], data: bytes) -> Message:
    try:
        message: Message = request_type.FromString(data)
    except DecodeError as error:
        raise InvalidRequestError(
            f"the request is not a {request_type.DESCRIPTOR.full_name}: a damaged message, or text that is not UTF-8"
        ) from error
    return message


async def _abort(context: grpc.aio.ServicerContext, code: str, sentence: str, retry_s: float | None) -> None:
    status = Status(code=grpc.StatusCode[code].value[0], message=sentence)
    if retry_s is not None:
        packed = AnyMessage()
        packed.Pack(RetryInfo(retry_delay=Duration(seconds=int(retry_s), nanos=int(retry_s % 1 * 1e9))))
        status.details.append(packed)
    await context.abort_with_status(rpc_status.to_status(status))
