"""Every error a user, checkpoint or peer can cause.

PhalanxError                                   status               retry
├─ ConfigError                                 FAILED_PRECONDITION  never      raised before a GPU is taken
├─ CheckpointError                             FAILED_PRECONDITION  never      names the file and tensor
├─ InvalidRequestError                         INVALID_ARGUMENT     never      names the field, value and limit
│  ├─ RequestTooLongError                      OUT_OF_RANGE         never      prompt + max_tokens past the limit
│  ├─ UnknownRequestError                      NOT_FOUND            never
│  └─ DuplicateRequestError                    ALREADY_EXISTS       never      same id, another body
├─ OverloadedError                             RESOURCE_EXHAUSTED   later      carries retry_after_s
├─ UnavailableError                            UNAVAILABLE          later      draining, starting, no replica
├─ DeadlineError                               DEADLINE_EXCEEDED    never
├─ ReplicaLostError                            UNAVAILABLE          elsewhere  keeps the first failing rank's traceback
└─ StepError                                   INTERNAL             never      one row, not the batch

A message says what, the offending value, the limit and the way out. `status` is the gRPC code's name as a string,
because this file may not import grpc; `deploy` maps it.
"""

from typing import ClassVar, Literal

Retry = Literal["never", "later", "elsewhere"]


class PhalanxError(Exception):
    """Base of every typed error; never raised itself."""

    status: ClassVar[str] = "INTERNAL"
    retry: ClassVar[Retry] = "never"


class ConfigError(PhalanxError):
    """A configuration that cannot work; raised before any device is taken."""

    status = "FAILED_PRECONDITION"


class CheckpointError(PhalanxError):
    """A checkpoint that is missing, damaged or not what the model needs; names the file and tensor."""

    status = "FAILED_PRECONDITION"


class InvalidRequestError(PhalanxError):
    """A request outside its limits; names the field, the value and the limit."""

    status = "INVALID_ARGUMENT"


class RequestTooLongError(InvalidRequestError):
    """Prompt plus requested output can never fit."""

    status = "OUT_OF_RANGE"


class UnknownRequestError(InvalidRequestError):
    """No job of this id."""

    status = "NOT_FOUND"


class DuplicateRequestError(InvalidRequestError):
    """The id is taken by a job with another body."""

    status = "ALREADY_EXISTS"


class OverloadedError(PhalanxError):
    """The queue is full; try again after `retry_after_s`."""

    status = "RESOURCE_EXHAUSTED"
    retry = "later"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(PhalanxError):
    """Draining, starting, or no replica is up."""

    status = "UNAVAILABLE"
    retry = "later"


class DeadlineError(PhalanxError):
    """The request's deadline passed."""

    status = "DEADLINE_EXCEEDED"


class ReplicaLostError(PhalanxError):
    """A rank died or hung; `str()` holds the first failing rank's traceback, its node and log path."""

    status = "UNAVAILABLE"
    retry = "elsewhere"


class StepError(PhalanxError):
    """One row of a step failed (for example NaN logits); the batch goes on."""
