"""The controller core with a clock and its effects carried out; everything here runs on one event loop."""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from phalanx import log
from phalanx.deploy.server import supervise
from phalanx.errors import UnavailableError
from phalanx.runtime import frames
from phalanx.runtime.controller.core import Core
from phalanx.runtime.controller.events import (
    AskScale,
    Changed,
    Close,
    Drained,
    Effect,
    EndRanks,
    Event,
    LinkLost,
    Reclaim,
    ScaleAnswer,
    Send,
    Start,
    StartRanks,
    SupervisorUp,
)
from phalanx.runtime.frames import ScaleEstimate

_logger = log.get("controller")

# Frames to one peer, encoded; None ends the link after what was put before it.
Outbox = asyncio.Queue[bytes | None]


class Shell:
    """Feeds events to the core and carries out what it answers.

    Attributes:
        drained: set while the core is draining and no job is live.
    """

    def __init__(self, core: Core, clock: Callable[[], float] = time.monotonic) -> None:
        self.core = core
        self.drained = asyncio.Event()
        self._clock = clock
        self._links = itertools.count(1)
        self._outboxes: dict[int, Outbox] = {}
        self._supervisors: list[Outbox] = []
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._calls = itertools.count(1)
        self._answers: dict[int, asyncio.Future[ScaleEstimate | None]] = {}

    def handle(self, event: Event) -> None:
        """Give an event to the core, now; raises what the core refuses a client with."""
        for effect in self.core.handle(event, self._clock()):
            self._carry_out(effect)
        if not self.core.is_draining:
            self.drained.clear()

    async def ask_scale(self, replica: int, data: int, leave: tuple[str, ...], timeout_s: float) -> ScaleEstimate:
        """What an engine says about scaling its replica.

        Raises:
            UnavailableError: the replica is not up, is lost meanwhile, or does not answer in time.
            InvalidRequestError: there is no such replica.
        """
        call = next(self._calls)
        answer: asyncio.Future[ScaleEstimate | None] = asyncio.get_running_loop().create_future()
        self._answers[call], estimate = answer, None
        try:
            self.handle(AskScale(call, replica, data, leave))
            estimate = await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            pass
        finally:
            del self._answers[call]
        if estimate is None:
            raise UnavailableError(f"replica {replica} was asked what scaling takes and has not answered; retry later")
        return estimate

    def open_link(self) -> tuple[int, Outbox]:
        """A new engine connection: its number, and what is to be sent to it."""
        link, outbox = next(self._links), Outbox()
        self._outboxes[link] = outbox
        return link, outbox

    def close_link(self, link: int, error: str) -> None:
        """The connection has ended."""
        del self._outboxes[link]
        self.handle(LinkLost(link, error))

    @contextmanager
    def supervisor(self) -> Iterator[Outbox]:
        """A supervisor is connected; what it has missed is put into its outbox first."""
        outbox = Outbox()
        self._supervisors.append(outbox)
        try:
            self.handle(SupervisorUp())
            if self.drained.is_set():
                outbox.put_nowait(supervise.encode(supervise.DrainDone()))
            yield outbox
        finally:
            self._supervisors.remove(outbox)

    @contextmanager
    def watch(self, request_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the job has changed."""
        changed = asyncio.Event()
        self._watchers.setdefault(request_id, set()).add(changed)
        try:
            yield changed
        finally:
            self._watchers[request_id].discard(changed)
            if not self._watchers[request_id]:
                del self._watchers[request_id]

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Send(link, frame):
                if link in self._outboxes:
                    self._outboxes[link].put_nowait(frames.encode(frame))
            case Close(link):
                if link in self._outboxes:
                    self._outboxes[link].put_nowait(None)
            case Changed(request_id):
                for changed in self._watchers.get(request_id, ()):
                    changed.set()
            case Reclaim(replica, incarnation, cause):
                error = self.core.replicas[replica].error
                fields = log.fields(replica=replica, incarnation=incarnation, cause=cause, error=error)
                _logger.warning("replica fenced", extra=fields)
                self._tell(supervise.Reclaim(replica, incarnation, cause))
            case Start(replica, incarnation, data):
                self._tell(supervise.Start(replica, incarnation, data))
            case StartRanks(replica, incarnation, op_id, units):
                self._tell(supervise.StartRanks(replica, incarnation, op_id, [list(unit) for unit in units]))
            case EndRanks(replica, incarnation, ranks):
                self._tell(supervise.EndRanks(replica, incarnation, list(ranks)))
            case ScaleAnswer(call, estimate):
                answer = self._answers.get(call)
                if answer is not None and not answer.done():
                    answer.set_result(estimate)
            case Drained():
                self.drained.set()
                self._tell(supervise.DrainDone())

    def _tell(self, frame: supervise.Frame) -> None:
        for outbox in self._supervisors:
            outbox.put_nowait(supervise.encode(frame))
