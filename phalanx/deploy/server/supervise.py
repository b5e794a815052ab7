"""Frames between the controller and the supervisor, which dials the engine port like an engine does.

    supervisor -> controller   SupervisorHello  ReplicaStarting  ReplicaGone  GrowFailed
    controller -> supervisor   Reclaim  DrainDone  Start  StartRanks  EndRanks

The supervisor allocates incarnations, one more for each start of a replica, and announces a number before the
processes that carry it exist; `Start` is the answer. What names another incarnation than the running one is dropped.
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


class GrowFailed(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """A rank of `StartRanks` could not be placed or started, or its process ended."""

    replica: int
    incarnation: int
    op_id: str
    reason: str


class Reclaim(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """End the processes of this incarnation, which is fenced, and start the replica anew; asked again on reconnect."""

    replica: int
    incarnation: int
    cause: str


class DrainDone(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """The controller is draining and its last job has ended."""


class Start(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """This incarnation may start, with so many dp ranks; None = as the plan says."""

    replica: int
    incarnation: int
    data: int | None


class StartRanks(msgspec.Struct, frozen=True, array_like=True, tag=14):
    """Start these ranks, one list per dp rank, and let them dial the engine; may be asked twice."""

    replica: int
    incarnation: int
    op_id: str
    units: list[list[int]]


class EndRanks(msgspec.Struct, frozen=True, array_like=True, tag=15):
    """End the processes of these ranks and give back what they used."""

    replica: int
    incarnation: int
    ranks: list[int]


Order = Reclaim | StartRanks | EndRanks
"""What a supervisor does with a running incarnation."""

Frame = (
    SupervisorHello | ReplicaStarting | ReplicaGone | GrowFailed | Reclaim | DrainDone | Start | StartRanks | EndRanks
)

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
