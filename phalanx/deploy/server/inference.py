"""The `Inference` service: requests in, chunks out.

A reader is a cursor into its job, never a queue: it writes what has accumulated since its last write, so a slow client
costs no memory and slows nobody.
"""

import asyncio
import random
import uuid
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field

import grpc

from phalanx.deploy.server import boundary, messages
from phalanx.deploy.server import phalanx_pb2 as pb
from phalanx.deploy.server.shell import Shell
from phalanx.errors import InvalidRequestError, RequestTooLongError, UnknownRequestError
from phalanx.runtime.controller.events import Attach, Cancel, Detach, Submit, Tick
from phalanx.runtime.controller.jobs import Job, JobRequest, OnDisconnect, body_digest, pack_ids
from phalanx.runtime.tokenizer import Tokenizer, encode_prompt
from phalanx.runtime.validate import RequestLimits, draw_seed, validate_request, validate_request_id

SERVICE = "phalanx.v1.Inference"
WRITE_INTERVAL_S = 0.01
DEADLINE_MARGIN_S = 0.15


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What clients may ask for.

    Attributes:
        tokenizer: None = requests carry token ids and answers no text.
        vocab_size, max_model_len: tokens.
        num_tasks: that requests may name.
    """

    name: str
    tokenizer: Tokenizer | None
    vocab_size: int
    max_model_len: int
    num_tasks: int = 0


@dataclass(slots=True)
class Cursor:
    """What one reader of a job holds already, per choice."""

    job: Job
    positions: list[int]
    finished: set[int] = field(default_factory=set)

    def take(self) -> Iterator[pb.Chunk]:
        """Chunks of everything new.

        Raises:
            InvalidRequestError: a position is past the end of a choice that has ended.
        """
        for index, choice in enumerate(self.job.choices):
            # A reader may be ahead of a job that is being recomputed: it waits for the job to get there.
            if index in self.finished or (choice.finish is None and choice.num_tokens < self.positions[index]):
                continue
            for delta in choice.output.deltas_from(self.positions[index]):
                self.positions[index] = delta.first_position + len(delta.token_ids)
                if delta.finish is not None:
                    self.finished.add(index)
                yield messages.chunk(self.job, index, delta)

    @property
    def is_done(self) -> bool:
        """Whether every choice has been read to its finish."""
        return len(self.finished) == len(self.job.choices)


class Inference:
    """Handlers of the service; one per process."""

    def __init__(self, shell: Shell, model: ServedModel, state_interval_s: float, rng: random.Random) -> None:
        self._shell = shell
        self._model = model
        self._state_interval_s = state_interval_s
        self._rng = rng

    def handler(self) -> grpc.GenericRpcHandler:
        """The methods, for a gRPC server."""
        methods = {
            "Generate": boundary.stream(pb.SubmitRequest, self.generate),
            "Submit": boundary.unary(pb.SubmitRequest, self.submit),
            "Stream": boundary.stream(pb.StreamRequest, self.stream),
            "Cancel": boundary.unary(pb.JobRef, self.cancel),
            "Get": boundary.unary(pb.GetRequest, self.get),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def generate(
        self, request: pb.SubmitRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.Chunk, None]:
        """Submit, and stream from 0; without a deadline of its own the job takes that of the call."""
        if not request.request_id:
            request.request_id = uuid.uuid4().hex
        remaining_s = context.time_remaining()
        if remaining_s is not None:
            # Earlier by a tick of the clock and a way over the network, so that the finish still reaches the client.
            remaining_s = max(remaining_s - DEADLINE_MARGIN_S, remaining_s / 2)
        job = await self._accept(request, "cancel", remaining_s)
        async for chunk in self._follow(Cursor(job, [0] * len(job.choices))):
            yield chunk

    async def submit(self, request: pb.SubmitRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        """Accept a job; the same request again answers with the same job."""
        return messages.job(await self._accept(request, "detach", None), with_output=False)

    async def stream(
        self, request: pb.StreamRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.Chunk, None]:
        """Follow a job from the client's positions on."""
        job = self._shell.core.job(request.request_id)
        async for chunk in self._follow(Cursor(job, messages.positions(request.from_position, len(job.choices)))):
            yield chunk

    async def cancel(self, request: pb.JobRef, context: grpc.aio.ServicerContext) -> pb.Job:
        """End a job."""
        self._shell.handle(Cancel(request.request_id))
        return messages.job(self._shell.core.job(request.request_id), with_output=False)

    async def get(self, request: pb.GetRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        """State of a job and its output so far."""
        with_output = request.include_output if request.HasField("include_output") else True
        return messages.job(self._shell.core.job(request.request_id), with_output=with_output)

    async def _accept(self, request: pb.SubmitRequest, default: OnDisconnect, call_s: float | None) -> Job:
        try:
            job_request = await self._job_request(request, default, call_s)
        except InvalidRequestError as error:
            reason = "too_long" if isinstance(error, RequestTooLongError) else "invalid"
            self._shell.core.meters.rejected[reason] += 1
            raise
        self._shell.handle(Submit(job_request))
        return self._shell.core.job(job_request.request_id)

    async def _job_request(self, request: pb.SubmitRequest, default: OnDisconnect, call_s: float | None) -> JobRequest:
        validate_request_id(request.request_id)
        if request.HasField("model") and request.model != self._model.name:
            raise UnknownRequestError(f"model {request.model!r} is not served here; this is {self._model.name!r}")
        asked = messages.sampling_params(request)
        deadline_s = messages.seconds(request.deadline) if request.HasField("deadline") else call_s
        on_disconnect = messages.on_disconnect(request, default)
        prompt = messages.prompt(request)
        if request.HasField("prompt_token_ids"):
            token_ids = encode_prompt(self._model.tokenizer, prompt)
        else:
            # Seconds for a long text: other streams go on meanwhile.
            token_ids = await asyncio.to_thread(encode_prompt, self._model.tokenizer, prompt)
        params = validate_request(token_ids, asked, self._limits())
        packed = pack_ids(token_ids)
        return JobRequest(
            request_id=request.request_id,
            digest=body_digest(packed, asked, request.priority),
            prompt_token_ids=packed,
            params=params,
            seed=draw_seed(self._rng) if asked.seed is None else asked.seed,
            priority=request.priority,
            deadline_s=deadline_s,
            on_disconnect=on_disconnect,
        )

    def _limits(self) -> RequestLimits:
        hellos = [replica.hello for replica in self._shell.core.replicas.values() if replica.hello is not None]
        return RequestLimits(
            self._model.vocab_size,
            self._model.max_model_len,
            max((hello.max_request_tokens for hello in hellos), default=self._model.max_model_len),
            self._model.tokenizer is not None,
            self._model.num_tasks,
        )

    async def _follow(self, cursor: Cursor) -> AsyncGenerator[pb.Chunk, None]:
        request_id = cursor.job.request.request_id
        self._shell.handle(Attach(request_id))
        try:
            with self._shell.watch(request_id) as changed:
                while True:
                    changed.clear()
                    for chunk in cursor.take():
                        yield chunk
                    if cursor.is_done:
                        return
                    await asyncio.sleep(WRITE_INTERVAL_S)
                    try:
                        await asyncio.wait_for(changed.wait(), self._state_interval_s)
                    except TimeoutError:
                        yield messages.state_chunk(cursor.job)
        finally:
            # The clock first: a call that ends at its deadline ends the job for that reason.
            self._shell.handle(Tick())
            self._shell.handle(Detach(request_id))
