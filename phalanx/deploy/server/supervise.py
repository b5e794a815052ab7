"""Frames between the controller and the supervisor, which dials the engine port like an engine does.

    supervisor -> controller   SupervisorHello  ReplicaStarting  ReplicaGone
    controller -> supervisor   Reclaim  DrainDone

The supervisor allocates incarnations, one more for each start of a replica, and announces a number before the
processes that carry it exist.
"""

import msgspec

from phalanx.runtime.frames import VERSION, WireError

MAX_FRAME_BYTES = 2**20


class SupervisorHello(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """First frame of a supervisor; `version` is that of `runtime/frames.py`."""

    version: int


class ReplicaStarting(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """This incarnation is about to start; all below it are fenced."""

    replica: int
    incarnation: int


class ReplicaGone(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The processes of this incarnation have ended.

    Attributes:
        cause: short and enumerable: "exit", "sigkill", "startup", "reclaimed".
        error: first error of the replica, for people.
    """

    replica: int
    incarnation: int
    cause: str
    error: str


class Reclaim(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """End the processes of this incarnation, which is fenced, and start the replica anew; asked again on reconnect."""

    replica: int
    incarnation: int
    cause: str


class DrainDone(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """The controller is draining and its last job has ended."""


Frame = SupervisorHello | ReplicaStarting | ReplicaGone | Reclaim | DrainDone

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def encode(frame: Frame) -> bytes:
    """A frame as bytes; inverse of `decode`."""
    return _encoder.encode(frame)


def decode(data: bytes) -> Frame:
    """Parse a frame of a peer; raises `WireError`."""
    if len(data) > MAX_FRAME_BYTES:
        raise WireError(f"supervisor frame of {len(data)} bytes; at most {MAX_FRAME_BYTES} are accepted")
    try:
        return _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise WireError(f"not a supervisor frame of version {VERSION}: {error}") from error
