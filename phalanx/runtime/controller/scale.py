"""Scale operations as the controller sees them: one part per replica, each of one incarnation.

    apply -> Scale to the engine
          -> ScaleState with wanted ranks -> StartRanks to the supervisor -> the ranks dial the engine
          -> ScaleState DONE or ABORTED, with gone ranks -> EndRanks to the supervisor

The engine runs the operation; here is what survives it: the state by `op_id`, and the size a replica restarts with. A
replica lost before its engine has said DONE restarts at its former size and its part is ABORTED; afterwards at the new
one.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from phalanx.errors import ConfigError, DuplicateRequestError, InvalidRequestError, UnavailableError
from phalanx.runtime.controller.events import (
    ApplyScale,
    AskScale,
    Effect,
    EndRanks,
    GrowFailed,
    ScaleAnswer,
    Send,
    StartRanks,
)
from phalanx.runtime.controller.replicas import Replica
from phalanx.runtime.frames import AbortScale, ScaleEstimate, ScaleState
from phalanx.runtime.frames import AskScale as AskFrame
from phalanx.runtime.frames import Scale as ScaleFrame
from phalanx.runtime.scaling import Phase

MAX_DATA = 4096
MAX_ID_LENGTH = 128
RETAINED = 64
"""Operations that are over and can still be asked for."""


@dataclass(slots=True)
class ReplicaScale:
    """An operation's part in one replica.

    Attributes:
        incarnation: that began it; with another one it is over.
        old, new: dp ranks before and wanted.
        detail: why it was aborted.
        wanted: ranks asked of the supervisor.
    """

    replica: int
    incarnation: int
    old: int
    new: int
    phase: Phase = "PREPARING"
    detail: str = ""
    wanted: tuple[tuple[int, ...], ...] = ()

    @property
    def is_over(self) -> bool:
        """Nothing more will happen."""
        return self.phase in ("DONE", "ABORTED")


@dataclass(frozen=True, slots=True)
class ScaleOperation:
    """All of an operation; `parts` by replica."""

    op_id: str
    data: int
    replicas: tuple[int, ...]
    leave: tuple[str, ...] = ()
    parts: dict[int, ReplicaScale] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Nothing more will happen."""
        return all(part.is_over for part in self.parts.values())

    @property
    def phase(self) -> Phase:
        """Of the part that is least far, while one is under way; then ABORTED if any was."""
        phases = [part.phase for part in self.parts.values()]
        order: tuple[Phase, ...] = ("PREPARING", "COMMITTING", "ABORTED", "DONE")
        return min(phases, key=order.index)


class Scaling:
    """All operations.

    Args:
        replicas: of the fleet, by number.
        emit: takes the effects.
    """

    def __init__(self, replicas: Mapping[int, Replica], emit: Callable[[Effect], None]) -> None:
        self._replicas, self._emit = replicas, emit
        self._operations: dict[str, ScaleOperation] = {}
        self._over: deque[str] = deque()
        self._asked: dict[int, tuple[int, int]] = {}
        self._gone: dict[int, tuple[int, set[int]]] = {}

    @property
    def running(self) -> ScaleOperation | None:
        """The operation under way; there is one at most."""
        return next((operation for operation in self._operations.values() if not operation.is_over), None)

    def find(self, op_id: str) -> ScaleOperation | None:
        """An operation, under way or lately over."""
        return self._operations.get(op_id)

    def ask(self, event: AskScale) -> None:
        """Pass the question on; raises as `apply` where the replica cannot be asked."""
        replica = self._ready(event.replica)
        self._asked[event.call] = (event.replica, replica.incarnation)
        self._send(replica, AskFrame(event.call, event.data, event.leave))

    def answer(self, replica: Replica, frame: ScaleEstimate) -> None:
        """An engine's answer; one to a question not asked of it is dropped."""
        if self._asked.get(frame.call) == (replica.replica, replica.incarnation):
            del self._asked[frame.call]
            self._emit(ScaleAnswer(frame.call, frame))

    def apply(self, event: ApplyScale) -> None:
        """Begin an operation; nothing happens if it is known.

        Raises:
            InvalidRequestError: the id or the size is out of range.
            DuplicateRequestError: the id is that of another operation.
            ConfigError: another operation is under way.
            UnavailableError: a replica is not up.
        """
        if not 1 <= len(event.op_id) <= MAX_ID_LENGTH:
            raise InvalidRequestError(f"op_id has {len(event.op_id)} characters; give 1 to {MAX_ID_LENGTH}")
        if not 1 <= event.data <= MAX_DATA:
            raise InvalidRequestError(f"data ({event.data}) must be 1 to {MAX_DATA}")
        known = self._operations.get(event.op_id)
        if known is not None:
            if (known.data, known.replicas, known.leave) != (event.data, event.replicas, event.leave):
                raise DuplicateRequestError(
                    f"scale operation {event.op_id!r} is for {_goal(known)}; use a new op_id for {_goal(event)}"
                )
            return
        running = self.running
        if running is not None:
            raise ConfigError(
                f"scale operation {running.op_id!r} to data {running.data} is under way ({running.phase}); "
                "wait for it, then try again"
            )
        replicas = [self._ready(number) for number in event.replicas or sorted(self._replicas)]
        if not replicas:
            raise UnavailableError("no replica is up yet; retry later")
        operation = ScaleOperation(event.op_id, event.data, event.replicas, event.leave)
        for replica in replicas:
            part = ReplicaScale(replica.replica, replica.incarnation, replica.data, event.data)
            operation.parts[replica.replica] = part
            if replica.data == event.data and not event.leave:
                part.phase, part.detail = "DONE", "it has this size already"
                replica.size = event.data
            else:
                self._send(replica, ScaleFrame(event.op_id, event.data, event.leave))
        self._operations[event.op_id] = operation
        self._retire(operation)

    def report(self, replica: Replica, frame: ScaleState) -> None:
        """An engine tells how an operation goes: one of ours, or one of its own after it lost a rank."""
        replica.data = frame.data
        replica.ranks = frame.ranks or replica.ranks
        if frame.gone:
            incarnation, gone = self._gone.get(replica.replica, (0, set()))
            gone = gone if incarnation == replica.incarnation else set()
            self._gone[replica.replica] = replica.incarnation, gone | set(frame.gone)
            self._emit(EndRanks(replica.replica, replica.incarnation, tuple(frame.gone)))
        operation = self._operations.get(frame.op_id)
        part = None if operation is None else operation.parts.get(replica.replica)
        if operation is None or part is None or part.is_over:  # `settle` has ended those of earlier incarnations
            return
        part.phase, part.detail = frame.phase, frame.detail
        wanted = tuple(map(tuple, frame.wanted))
        if wanted and not part.wanted:
            part.wanted = wanted
            self._want(operation, part)
        if frame.phase == "DONE":
            replica.size = frame.data
        self._retire(operation)

    def failed(self, event: GrowFailed) -> None:
        """A rank could not be started: the engine takes the operation back if it still can."""
        replica, operation = self._replicas.get(event.replica), self._operations.get(event.op_id)
        part = None if operation is None else operation.parts.get(event.replica)
        if replica is not None and part is not None and not part.is_over and replica.accepts(event.incarnation):
            self._send(replica, AbortScale(event.op_id, event.reason))

    def supervised(self) -> None:
        """A supervisor connected: repeat what may not have reached it."""
        operation = self.running
        for part in operation.parts.values() if operation is not None else ():
            if operation is not None and part.wanted and not part.is_over:
                self._want(operation, part)
        for number, (incarnation, gone) in self._gone.items():
            if self._replicas[number].accepts(incarnation):
                self._emit(EndRanks(number, incarnation, tuple(sorted(gone))))

    def settle(self) -> None:
        """After every event: end what belongs to an incarnation that is not live any more."""
        for call, (number, incarnation) in list(self._asked.items()):
            if not self._replicas[number].accepts(incarnation):
                del self._asked[call]
                self._emit(ScaleAnswer(call, None))
        operation = self.running
        if operation is None:
            return
        for part in operation.parts.values():
            replica = self._replicas[part.replica]
            if not part.is_over and not replica.accepts(part.incarnation):
                part.phase = "ABORTED"
                part.detail = f"the replica was lost and restarts at its former size: {replica.error}"
        self._retire(operation)

    def check(self) -> None:
        """All invariants, O(operations)."""
        under_way = [operation for operation in self._operations.values() if not operation.is_over]
        assert len(under_way) <= 1
        assert len(self._over) <= RETAINED
        assert set(self._operations) == {*self._over, *(operation.op_id for operation in under_way)}
        for operation in under_way:
            for part in operation.parts.values():
                assert part.is_over or self._replicas[part.replica].accepts(part.incarnation)

    def _retire(self, operation: ScaleOperation) -> None:
        if operation.is_over and operation.op_id not in self._over:
            self._over.append(operation.op_id)
            if len(self._over) > RETAINED:
                del self._operations[self._over.popleft()]

    def _want(self, operation: ScaleOperation, part: ReplicaScale) -> None:
        self._emit(StartRanks(part.replica, part.incarnation, operation.op_id, part.wanted))

    def _ready(self, number: int) -> Replica:
        replica = self._replicas.get(number)
        if replica is None:
            known = ", ".join(map(str, sorted(self._replicas))) or "none yet"
            raise InvalidRequestError(f"there is no replica {number}; the replicas are {known}")
        if replica.state != "ready":
            raise UnavailableError(f"replica {number} is {replica.state}; retry when it is ready")
        return replica

    def _send(self, replica: Replica, frame: AskFrame | ScaleFrame | AbortScale) -> None:
        assert replica.link is not None, "it is ready"
        self._emit(Send(replica.link, frame))


def _goal(of: ScaleOperation | ApplyScale) -> str:
    replicas = "replica " + ", ".join(map(str, of.replicas)) if of.replicas else "all replicas"
    return f"data {of.data} of {replicas}" + (f" without {', '.join(of.leave)}" if of.leave else "")
