"""What happens to the controller (events) and what it wants done (effects).

A link is the shell's number of one open connection of an engine; it is never used twice.
"""

from typing import NamedTuple

from phalanx.runtime.controller.jobs import JobRequest
from phalanx.runtime.frames import Frame, ScaleEstimate


class Submit(NamedTuple):
    """A client wants this job to exist."""

    request: JobRequest


class Attach(NamedTuple):
    """A reader starts to follow a job."""

    request_id: str


class Detach(NamedTuple):
    """A reader that had attached is gone, for whatever reason."""

    request_id: str


class Cancel(NamedTuple):
    """A client wants the job to end; nothing happens to a finished one."""

    request_id: str


class Drain(NamedTuple):
    """Refuse new jobs and report when the last one has ended; `undo` accepts jobs again."""

    undo: bool = False


class FrameReceived(NamedTuple):
    """An engine sent a frame."""

    link: int
    frame: Frame


class LinkLost(NamedTuple):
    """The connection of an engine ended; `error` says how."""

    link: int
    error: str


class ReplicaStarting(NamedTuple):
    """The supervisor allocated this incarnation and starts its processes."""

    replica: int
    incarnation: int


class ReplicaGone(NamedTuple):
    """The supervisor saw the processes of this incarnation end.

    Attributes:
        cause: short and enumerable, for example "exit", "sigkill", "startup".
        error: first error of the replica, for people.
    """

    replica: int
    incarnation: int
    cause: str
    error: str


class SupervisorUp(NamedTuple):
    """A supervisor connected; what it has not done yet is asked of it again."""


class AskScale(NamedTuple):
    """Somebody wants to know what scaling a replica to `data` dp ranks would take; `call` is never used twice."""

    call: int
    replica: int
    data: int
    leave: tuple[str, ...] = ()


class ApplyScale(NamedTuple):
    """An operator wants replicas to have `data` dp ranks; the same `op_id` is the same operation.

    Attributes:
        replicas: numbers of those meant; empty = all.
        leave: names of nodes on which no rank of them shall stay.
    """

    op_id: str
    data: int
    replicas: tuple[int, ...] = ()
    leave: tuple[str, ...] = ()


class GrowFailed(NamedTuple):
    """The supervisor could not start a rank that an operation wants, or saw it die."""

    replica: int
    incarnation: int
    op_id: str
    reason: str


class Tick(NamedTuple):
    """Time passed; sent by the shell at least every 100 ms."""


Event = (
    Submit
    | Attach
    | Detach
    | Cancel
    | Drain
    | FrameReceived
    | LinkLost
    | ReplicaStarting
    | ReplicaGone
    | SupervisorUp
    | AskScale
    | ApplyScale
    | GrowFailed
    | Tick
)


class Send(NamedTuple):
    """Send a frame to the engine on this link; dropped if the link has ended."""

    link: int
    frame: Frame


class Close(NamedTuple):
    """End a link after everything sent to it."""

    link: int


class Reclaim(NamedTuple):
    """Ask the supervisor to end the processes of a fenced incarnation and to start the replica anew."""

    replica: int
    incarnation: int
    cause: str


class Start(NamedTuple):
    """The supervisor may start this incarnation, with so many dp ranks; None = as the plan says."""

    replica: int
    incarnation: int
    data: int | None


class StartRanks(NamedTuple):
    """Ask the supervisor for further ranks of a running replica, one tuple per dp rank."""

    replica: int
    incarnation: int
    op_id: str
    units: tuple[tuple[int, ...], ...]


class EndRanks(NamedTuple):
    """Ranks that the engine has let go, or does not want any more: their processes may end."""

    replica: int
    incarnation: int
    ranks: tuple[int, ...]


class ScaleAnswer(NamedTuple):
    """What an engine says to `AskScale`; None = it cannot answer any more."""

    call: int
    estimate: ScaleEstimate | None


class Changed(NamedTuple):
    """A job has new output or a new state: wake its readers."""

    request_id: str


class Drained(NamedTuple):
    """The controller is draining and its last job has ended."""


Effect = Send | Close | Reclaim | Start | StartRanks | EndRanks | ScaleAnswer | Changed | Drained
