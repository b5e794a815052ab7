"""What a client does when a call fails, and where its stream goes on: the part that sync and async clients share.

No sockets, no sleep: `failed` says how long to wait or raises the typed error; `Follow.next_call` says what to call.
gRPC's own retry cannot do this: it gives a call up for good at the first header it has received.
"""

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import grpc
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from phalanx.deploy import client_messages
from phalanx.deploy.client_messages import Chunk
from phalanx.deploy.server import phalanx_pb2 as pb
from phalanx.errors import (
    ConfigError,
    DeadlineError,
    DuplicateRequestError,
    InvalidRequestError,
    OverloadedError,
    PhalanxError,
    RequestTooLongError,
    StepError,
    UnavailableError,
    UnknownRequestError,
)

FIRST_DELAY_S, MAX_DELAY_S = 0.05, 2.0

_DETAILS = "grpc-status-details-bin"
_ERRORS: Mapping[str, type[PhalanxError]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "OUT_OF_RANGE": RequestTooLongError,
    "NOT_FOUND": UnknownRequestError,
    "ALREADY_EXISTS": DuplicateRequestError,
    "DEADLINE_EXCEEDED": DeadlineError,
    "FAILED_PRECONDITION": ConfigError,
    "PERMISSION_DENIED": ConfigError,
    "UNAUTHENTICATED": ConfigError,
    "UNIMPLEMENTED": ConfigError,
    "UNAVAILABLE": UnavailableError,
    "CANCELLED": UnavailableError,
}
_TRANSPORT_CODES = ("UNAVAILABLE", "UNKNOWN", "INTERNAL", "CANCELLED")


class Failure(NamedTuple):
    """A call that ended with an error.

    Attributes:
        is_answer: the server itself said so; else the connection did, somewhere on the way.
        retry_after_s: when the server wants to be asked again; None = it did not say.
    """

    code: str
    sentence: str
    is_answer: bool
    retry_after_s: float | None

    def error(self) -> PhalanxError:
        """The typed error, with the server's sentence."""
        if self.code == "RESOURCE_EXHAUSTED":
            # Without a time to come back it is a message too large, which no waiting makes smaller.
            if self.retry_after_s is None:
                return InvalidRequestError(self.sentence)
            return OverloadedError(self.sentence, self.retry_after_s)
        return _ERRORS.get(self.code, StepError)(self.sentence)


def failure(error: grpc.RpcError) -> Failure:
    """What an error of grpc or grpc.aio says."""
    status, retry_after_s = None, None
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS:
            status = Status.FromString(value)
    for detail in () if status is None else status.details:
        if detail.Is(RetryInfo.DESCRIPTOR):
            retry = RetryInfo.FromString(detail.value)
            retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return Failure(error.code().name, error.details() or "", status is not None, retry_after_s)


class Attempts:
    """Repeats of one call over broken connections, until `retry_s` have passed without progress.

    Args:
        address: of the server, for the error.
        rng: jitter, so that many clients do not come back at once.
    """

    def __init__(self, address: str, retry_s: float, rng: random.Random) -> None:
        self._address = address
        self._retry_s = retry_s
        self._rng = rng
        self._delay_s = FIRST_DELAY_S
        self._failing_since: float | None = None

    def progressed(self) -> None:
        """The server answered: patience starts anew."""
        self._delay_s = FIRST_DELAY_S
        self._failing_since = None

    def failed(self, failed: Failure, now: float, *, waits: bool = False) -> float:
        """Seconds to wait before the next attempt.

        Args:
            failed: how the last one ended.
            now: monotonic seconds.
            waits: also wait when the server itself asks to come back later.

        Raises:
            PhalanxError: there is no use in another attempt.
        """
        may_retry = failed.retry_after_s is not None and waits if failed.is_answer else failed.code in _TRANSPORT_CODES
        if not may_retry:
            raise failed.error()
        if self._failing_since is None:
            self._failing_since = now
        if now - self._failing_since >= self._retry_s:
            raise UnavailableError(
                f"{self._address} cannot be reached for {self._retry_s:g} s ({failed.code}: {failed.sentence}); "
                "check the address and that the service is up"
            )
        delay_s = max(self._delay_s, failed.retry_after_s or 0.0) * self._rng.uniform(0.5, 1.5)
        self._delay_s = min(2 * self._delay_s, MAX_DELAY_S)
        return delay_s


class Follow:
    """One logical stream over any number of calls: every token and every byte of text once, in order.

    Args:
        submit: the request, when this stream also creates the job; None = only follow it.
        request_id: of the job.
        from_position: per choice, as in `StreamRequest`.
        attempts: fresh.
    """

    def __init__(
        self, submit: pb.SubmitRequest | None, request_id: str, from_position: Sequence[int], attempts: Attempts
    ) -> None:
        self.request_id = request_id
        self.attempts = attempts
        self._submit = submit
        self._start = list(from_position)
        self._positions: dict[int, int] = {}
        self._text_bytes: dict[int, int] = {}
        self._finished: set[int] = set()
        self._has_answer = False
        self._is_over = False

    @property
    def must_cancel(self) -> bool:
        """Whether a job that this stream created may still run."""
        return self._submit is not None and not self._is_over

    def next_call(self) -> tuple[str, pb.SubmitRequest | pb.StreamRequest]:
        """(method, request): the first call again while nothing has come of it, which is idempotent; else re-attach."""
        if self._submit is not None and not self._has_answer:
            return "Generate", self._submit
        return "Stream", pb.StreamRequest(request_id=self.request_id, from_position=self._cursor())

    def accept(self, message: pb.Chunk) -> Chunk | None:
        """Take a message of the stream; None if there is nothing new in it.

        Raises:
            StepError: it does not continue what is already here.
        """
        self.attempts.progressed()
        self._has_answer = True
        if message.HasField("state") or message.choice in self._finished:
            return None
        chunk = client_messages.chunk(message)
        position = self._positions.get(chunk.choice, self._start_of(chunk.choice))
        text_bytes = self._text_bytes.get(chunk.choice, chunk.text_offset)
        if (chunk.position, chunk.text_offset) != (position, text_bytes):
            self._is_over = True  # the job itself is left as it is
            raise StepError(
                f"request {self.request_id!r} choice {chunk.choice}: the server went on at token {chunk.position}, "
                f"byte {chunk.text_offset}; token {position}, byte {text_bytes} was next; read the job with get()"
            )
        self._positions[chunk.choice] = position + len(chunk.token_ids)
        self._text_bytes[chunk.choice] = text_bytes + len(chunk.text.encode())
        if chunk.finish_reason is not None:
            self._finished.add(chunk.choice)
        return chunk

    def ended(self) -> None:
        """The server ended the stream: every choice has its finish."""
        self._is_over = True

    def failed(self, failed: Failure, now: float) -> float:
        """Seconds to wait before `next_call`; raises as `Attempts.failed`."""
        try:
            return self.attempts.failed(failed, now, waits=self._has_answer)
        except PhalanxError:
            # A refused request left no job behind; an unreachable server could not be told anyway.
            self._is_over = True
            raise

    def _start_of(self, choice: int) -> int:
        return self._start[min(choice, len(self._start) - 1)] if self._start else 0

    def _cursor(self) -> list[int]:
        # One more entry than choices seen: it holds for all those not yet seen.
        num_seen = max(self._positions, default=-1) + 1
        known = [self._positions.get(choice, self._start_of(choice)) for choice in range(num_seen)]
        return [*known, *(self._start[num_seen:] or [self._start_of(num_seen)])]
