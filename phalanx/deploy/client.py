"""Talk to a running service: `Client`, and `AsyncClient` with the same methods.

    with Client("127.0.0.1:50051") as client:
        for chunk in client.generate("def main():", SamplingParams(max_tokens=64, seed=7)):
            print(chunk.text, end="")

A connection that breaks is made again and every stream goes on where it was: no token and no byte of text is lost or
repeated. Errors are those of `phalanx.errors`, with the server's sentence.
"""

import asyncio
import contextlib
import random
import time
import uuid
from collections.abc import AsyncGenerator, Generator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from phalanx.deploy import client_messages, client_scale
from phalanx.deploy.client_messages import (
    ChoiceResult,
    Chunk,
    ClusterState,
    Job,
    JobCounts,
    Prompt,
    ReplicaStatus,
    Usage,
)
from phalanx.deploy.client_resume import Attempts, Follow, failure
from phalanx.deploy.client_scale import ScaleOperation, ScalePlan
from phalanx.deploy.server import phalanx_pb2 as pb
from phalanx.deploy.server.links import KEEPALIVE_OPTIONS
from phalanx.deploy.server.phalanx_pb2_grpc import ClusterStub, InferenceStub
from phalanx.errors import UnavailableError
from phalanx.runtime.sampling_params import SamplingParams

__all__ = [
    "AsyncClient",
    "ChoiceResult",
    "Chunk",
    "Client",
    "ClusterState",
    "Job",
    "JobCounts",
    "ReplicaStatus",
    "ScaleOperation",
    "ScalePlan",
    "Usage",
]

CALL_S = 30.0
LAST_CALL_S = 2.0
OPTIONS = (
    *KEEPALIVE_OPTIONS,
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


class _Requests:
    """What both clients send."""

    def __init__(self, address: str, *, model: str | None = None, retry_s: float = 10.0) -> None:
        self.address = address
        self._model = model
        self._retry_s = retry_s
        self._rng = random.Random()
        self._is_closed = False

    def _attempts(self) -> Attempts:
        if self._is_closed:
            raise UnavailableError(f"the client of {self.address} is closed; make a new one")
        return Attempts(self.address, self._retry_s, self._rng)

    def _generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None,
        deadline_s: float | None,
        priority: int,
    ) -> Follow:
        # The grace is there for the reconnect; whoever closes the iterator early cancels at once.
        request = self._submit(prompt, params, request_id, deadline_s, priority, pb.CANCEL_AFTER_GRACE)
        return Follow(request, request.request_id, (), self._attempts())

    def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None,
        deadline_s: float | None,
        priority: int,
        on_disconnect: pb.OnDisconnect,
    ) -> pb.SubmitRequest:
        return client_messages.submit_request(
            prompt,
            params,
            request_id=request_id or uuid.uuid4().hex,
            model=self._model,
            deadline_s=deadline_s,
            priority=priority,
            on_disconnect=on_disconnect,
        )

    def _stream(self, request_id: str, from_position: int | Sequence[int]) -> Follow:
        starts = (from_position,) if isinstance(from_position, int) else from_position
        return Follow(None, request_id, starts, self._attempts())


class Client(_Requests):
    """A synchronous client; may be shared between threads.

    Args:
        address: host:port of the service.
        model: name the service must serve; None = whichever it is.
        retry_s: how long a call is repeated over a broken connection before `UnavailableError`.
    """

    def __init__(self, address: str, *, model: str | None = None, retry_s: float = 10.0) -> None:
        super().__init__(address, model=model, retry_s=retry_s)
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._inference = InferenceStub(self._channel)
        self._cluster = ClusterStub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        deadline_s: float | None = None,
        priority: int = 0,
    ) -> Generator[Chunk, None, None]:
        """Run a request and yield its output as it comes; closing the iterator early cancels the job.

        Nothing is sent before the first chunk is asked for.

        Args:
            prompt: a text, a list of token ids, or a list of {"role": ..., "content": ...}.
            params: sampling and stopping; None = the defaults.
            request_id: chosen by the caller to find the job again; None = drawn.
            deadline_s: the job ends after this long, with finish_reason "deadline".
            priority: smaller runs first.

        Raises:
            InvalidRequestError: refused by a limit, which the message names.
            OverloadedError, UnavailableError: try again later.
        """
        return self._follow(self._generate(prompt, params, request_id, deadline_s, priority))

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        deadline_s: float | None = None,
        priority: int = 0,
    ) -> Job:
        """Start a job that runs without a reader; the same request again returns the same job. As `generate`."""
        request = self._submit(prompt, params, request_id, deadline_s, priority, pb.DETACH)
        return client_messages.job(self._call(self._inference.Submit, request))

    def stream(self, request_id: str, from_position: int | Sequence[int] = 0) -> Generator[Chunk, None, None]:
        """Follow a job from a position on (one for all choices, or one per choice), any number of times.

        Raises:
            UnknownRequestError: there is no job of this id (any more).
        """
        return self._follow(self._stream(request_id, from_position))

    def get(self, request_id: str) -> Job:
        """A job and all its output so far; raises `UnknownRequestError`."""
        return client_messages.job(self._call(self._inference.Get, pb.GetRequest(request_id=request_id)))

    def cancel(self, request_id: str) -> Job:
        """End a job; nothing happens to a finished one. Raises `UnknownRequestError`."""
        return client_messages.job(self._call(self._inference.Cancel, pb.JobRef(request_id=request_id)))

    def status(self) -> ClusterState:
        """What runs where."""
        return client_messages.cluster_state(self._call(self._cluster.Status, pb.StatusRequest()))

    def drain(self, *, undo: bool = False) -> JobCounts:
        """Let the service refuse new jobs (or accept them again); returns the jobs it still has."""
        return client_messages.job_counts(self._call(self._cluster.Drain, pb.DrainRequest(undo=undo)).jobs)

    def plan_scale(self, data: int, replica: int | None = None, *, leave: Sequence[str] = ()) -> ScalePlan:
        """What it would take to give one replica (None = each) `data` data-parallel ranks, or why it cannot be.

        Args:
            data: data-parallel ranks of each replica that is meant.
            replica: one of them; None = all.
            leave: names of Ray nodes, as `status` shows them, on which no rank shall stay.

        Raises:
            UnavailableError: a replica is not up.
        """
        return client_scale.plan(self._call(self._cluster.PlanScale, client_scale.target(data, replica, leave)))

    def apply_scale(
        self,
        op_id: str,
        data: int,
        replica: int | None = None,
        *,
        plan_id: str | None = None,
        leave: Sequence[str] = (),
    ) -> ScaleOperation:
        """Begin to scale and return at once. The same `op_id` again returns the state of the same operation.

        Args:
            op_id: chosen by the caller.
            data: data-parallel ranks of each replica that is meant.
            replica: one of them; None = all.
            plan_id: of a plan that must still hold when the operation begins.
            leave: names of Ray nodes, as `status` shows them, on which no rank shall stay.

        Raises:
            ConfigError: it cannot be, another operation is under way, or the plan is outdated.
            DuplicateRequestError: the id is that of another operation.
            UnavailableError: a replica is not up.
        """
        request = client_scale.request(op_id, data, replica, plan_id, leave)
        return client_scale.operation(self._call(self._cluster.ApplyScale, request))

    def close(self) -> None:
        """End the connection; open streams end with `UnavailableError`."""
        self._is_closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: grpc.UnaryUnaryMultiCallable, request: Any) -> Any:
        attempts = self._attempts()
        while True:
            try:
                return method(request, timeout=CALL_S)
            except grpc.RpcError as error:
                time.sleep(attempts.failed(failure(error), time.monotonic()))

    def _follow(self, follow: Follow) -> Generator[Chunk, None, None]:
        try:
            while not self._is_closed:
                method, request = follow.next_call()
                call = getattr(self._inference, method)(request)
                try:
                    for message in call:
                        chunk = follow.accept(message)
                        if chunk is not None:
                            yield chunk
                    follow.ended()
                    return
                except grpc.RpcError as error:
                    time.sleep(follow.failed(failure(error), time.monotonic()))
                finally:
                    call.cancel()
            self._attempts()
        finally:
            if follow.must_cancel and not self._is_closed:
                self._cancel_quietly(follow.request_id)

    def _cancel_quietly(self, request_id: str) -> None:
        # The job may be unknown, or the server gone: then its grace ends it.
        with contextlib.suppress(grpc.RpcError):
            self._inference.Cancel(pb.JobRef(request_id=request_id), timeout=LAST_CALL_S)


class AsyncClient(_Requests):
    """An asynchronous client; to be made and used inside one running event loop. Methods as in `Client`."""

    def __init__(self, address: str, *, model: str | None = None, retry_s: float = 10.0) -> None:
        super().__init__(address, model=model, retry_s=retry_s)
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self._inference = InferenceStub(self._channel)
        self._cluster = ClusterStub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        deadline_s: float | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[Chunk, None]:
        """As `Client.generate`; `aclose` the iterator, or leave it by `break`, to cancel the job."""
        return self._follow(self._generate(prompt, params, request_id, deadline_s, priority))

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        deadline_s: float | None = None,
        priority: int = 0,
    ) -> Job:
        """As `Client.submit`."""
        request = self._submit(prompt, params, request_id, deadline_s, priority, pb.DETACH)
        return client_messages.job(await self._call(self._inference.Submit, request))

    def stream(self, request_id: str, from_position: int | Sequence[int] = 0) -> AsyncGenerator[Chunk, None]:
        """As `Client.stream`."""
        return self._follow(self._stream(request_id, from_position))

    async def get(self, request_id: str) -> Job:
        """As `Client.get`."""
        return client_messages.job(await self._call(self._inference.Get, pb.GetRequest(request_id=request_id)))

    async def cancel(self, request_id: str) -> Job:
        """As `Client.cancel`."""
        return client_messages.job(await self._call(self._inference.Cancel, pb.JobRef(request_id=request_id)))

    async def status(self) -> ClusterState:
        """As `Client.status`."""
        return client_messages.cluster_state(await self._call(self._cluster.Status, pb.StatusRequest()))

    async def drain(self, *, undo: bool = False) -> JobCounts:
        """As `Client.drain`."""
        return client_messages.job_counts((await self._call(self._cluster.Drain, pb.DrainRequest(undo=undo))).jobs)

    async def plan_scale(self, data: int, replica: int | None = None, *, leave: Sequence[str] = ()) -> ScalePlan:
        """As `Client.plan_scale`."""
        return client_scale.plan(await self._call(self._cluster.PlanScale, client_scale.target(data, replica, leave)))

    async def apply_scale(
        self,
        op_id: str,
        data: int,
        replica: int | None = None,
        *,
        plan_id: str | None = None,
        leave: Sequence[str] = (),
    ) -> ScaleOperation:
        """As `Client.apply_scale`."""
        request = client_scale.request(op_id, data, replica, plan_id, leave)
        return client_scale.operation(await self._call(self._cluster.ApplyScale, request))

    async def close(self) -> None:
        """As `Client.close`."""
        self._is_closed = True
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: grpc.aio.UnaryUnaryMultiCallable, request: Any) -> Any:
        attempts = self._attempts()
        while True:
            try:
                return await method(request, timeout=CALL_S)
            except grpc.aio.AioRpcError as error:
                await asyncio.sleep(attempts.failed(failure(error), time.monotonic()))

    async def _follow(self, follow: Follow) -> AsyncGenerator[Chunk, None]:
        try:
            while not self._is_closed:
                method, request = follow.next_call()
                call = getattr(self._inference, method)(request)
                try:
                    async for message in call:
                        chunk = follow.accept(message)
                        if chunk is not None:
                            yield chunk
                    follow.ended()
                    return
                except grpc.aio.AioRpcError as error:
                    await asyncio.sleep(follow.failed(failure(error), time.monotonic()))
                finally:
                    call.cancel()
            self._attempts()
        finally:
            if follow.must_cancel and not self._is_closed:
                await self._cancel_quietly(follow.request_id)

    async def _cancel_quietly(self, request_id: str) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self._inference.Cancel(pb.JobRef(request_id=request_id), timeout=LAST_CALL_S)
