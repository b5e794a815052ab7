"""The controller's decisions: which jobs exist, where they run, what they have produced.

Sans-IO: `handle` takes one event and the time and returns what has to be done; nothing here knows a clock, a socket,
a thread or a random number. Two rules carry the promise that a delivered token never changes, repeats or goes
missing:

1. Fence before placing again. A job leaves a replica only together with its epoch; rows of another epoch, and all
   messages of an incarnation that is not the live one, are dropped.
2. Positions are appended strictly in order (`Choice.take`).
"""

import heapq
from bisect import insort
from collections import deque
from collections.abc import Callable

import msgspec

from phalanx.errors import DuplicateRequestError, OverloadedError, UnavailableError, UnknownRequestError
from phalanx.runtime.controller.events import (
    ApplyScale,
    AskScale,
    Attach,
    Cancel,
    Changed,
    Detach,
    Drain,
    Drained,
    Effect,
    Event,
    FrameReceived,
    GrowFailed,
    LinkLost,
    ReplicaGone,
    ReplicaStarting,
    Send,
    Submit,
    SupervisorUp,
    Tick,
)
from phalanx.runtime.controller.fleet import Fleet
from phalanx.runtime.controller.jobs import Choice, Job, JobRequest
from phalanx.runtime.controller.meters import Meters
from phalanx.runtime.controller.replicas import Replica
from phalanx.runtime.controller.scale import Scaling
from phalanx.runtime.frames import (
    Abort,
    Failed,
    FinishReason,
    Frame,
    Heartbeat,
    Hello,
    ScaleEstimate,
    ScaleState,
    TokenEvents,
    TokenRow,
)
from phalanx.runtime.output import ChoiceOutput
from phalanx.runtime.policies import least_load
from phalanx.runtime.sampling_params import SamplingParams

MAX_READERS = 4
STALL_S = 0.5


class CoreConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits and timers of the controller.

    Attributes:
        max_queue: jobs waiting for a place, beyond which new ones are refused.
        max_choices: choices placed on one replica at a time; the rest waits here, in order of priority.
        lease_s: silence after which a replica is fenced.
        detach_grace_s: how long a job with on_disconnect = "cancel_after_grace" outlives its last reader.
        retain_s: how long a finished job can be read.
        retain_jobs: how many finished jobs are kept at most.
    """

    max_queue: int = 1024
    max_choices: int = 1024
    lease_s: float = 2.0
    detach_grace_s: float = 30.0
    retain_s: float = 3600.0
    retain_jobs: int = 4096


class Core:
    """Jobs and replicas of one service.

    `jobs`, `replicas`, `queue`, `scaling`, `meters`, `is_draining` may be read by anybody; only `handle` changes them.
    """

    def __init__(
        self,
        config: CoreConfig,
        new_outputs: Callable[[SamplingParams], list[ChoiceOutput]],
        decide: Callable[[least_load.PlacementView, float], least_load.Decision] = least_load.decide,
    ) -> None:
        self.config = config
        self.jobs: dict[str, Job] = {}
        self.queue: list[Job] = []
        self.meters = Meters()
        self.is_draining = False
        self._new_outputs = new_outputs
        self._decide = decide
        self._effects: list[Effect] = []
        self._fleet = Fleet(self.meters, self._emit)
        self.scaling = Scaling(self._fleet.replicas, self._emit)
        self._timers: list[tuple[float, str]] = []
        self._gaps: set[str] = set()
        self._retained: deque[Job] = deque()
        self._num_orders = 0
        self._num_epochs = 0
        self._last_tick_at: float | None = None

    @property
    def replicas(self) -> dict[int, Replica]:
        """Every replica ever heard of, by number."""
        return self._fleet.replicas

    @property
    def num_live(self) -> int:
        """Jobs that have not ended."""
        return len(self.jobs) - len(self._retained)

    @property
    def is_ready(self) -> bool:
        """Whether a job submitted now would run: a replica is up, and the service is not draining."""
        return not self.is_draining and any(replica.state == "ready" for replica in self.replicas.values())

    def job(self, request_id: str) -> Job:
        """The job of this id, live or retained.

        Raises:
            UnknownRequestError: there is none.
        """
        if request_id not in self.jobs:
            raise UnknownRequestError(
                f"request {request_id!r} is unknown; finished ones are kept for {self.config.retain_s:g} s, "
                f"the latest {self.config.retain_jobs} of them"
            )
        return self.jobs[request_id]

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Apply one event.

        Args:
            event: what happened.
            now: monotonic seconds, never decreasing from call to call.

        Returns:
            What the shell has to do, in order.

        Raises:
            OverloadedError, UnavailableError, DuplicateRequestError, UnknownRequestError: a client's event is
                refused; nothing has changed.
            ConfigError, InvalidRequestError: an operator's is.
        """
        match event:
            case Submit(request):
                self._submit(request, now)
            case Attach(request_id):
                self._attach(self.job(request_id))
            case Detach(request_id):
                self._detach(self.job(request_id), now)
            case Cancel(request_id):
                self._end(self.job(request_id), "cancelled", now)
            case Drain(undo):
                self.is_draining = not undo
                self._report_drained()
            case FrameReceived(link, frame):
                self._receive(link, frame, now)
            case LinkLost(link, error):
                self._enqueue(self._fleet.disconnected(link, error))
            case ReplicaStarting():
                self._enqueue(self._fleet.starting(event))
            case ReplicaGone():
                self._enqueue(self._fleet.gone(event))
            case SupervisorUp():
                self._fleet.supervised()
                self.scaling.supervised()
            case AskScale():
                self.scaling.ask(event)
            case ApplyScale():
                self.scaling.apply(event)
            case GrowFailed():
                self.scaling.failed(event)
            case Tick():
                self._tick(now)
        self.scaling.settle()
        self._place_queued(now)
        effects = self._effects[:]
        self._effects.clear()
        return effects

    def check(self) -> None:
        """All invariants, O(jobs). For tests and idle loops."""
        self._fleet.check()
        self.scaling.check()
        assert self.queue == sorted(self.queue, key=lambda job: job.queue_key)
        queued = {job.request.request_id for job in self.queue}
        assert len(queued) == len(self.queue)
        retained = {job.request.request_id for job in self._retained}
        epochs = [job.epoch for job in self.jobs.values() if job.epoch]
        assert len(set(epochs)) == len(epochs)
        assert max(epochs, default=0) <= self._num_epochs
        for request_id, job in self.jobs.items():
            assert request_id == job.request.request_id
            job.check()
            assert (job.state == "queued") == (request_id in queued)
            assert (job.state == "finished") == (request_id in retained)
            if job.replica is not None:
                assert self.replicas[job.replica].jobs[request_id] is job
            assert (job.gap_since is not None) == (request_id in self._gaps)

    # Clients

    def _submit(self, request: JobRequest, now: float) -> None:
        known = self.jobs.get(request.request_id)
        if known is not None:
            if known.request.digest != request.digest:
                self.meters.rejected["duplicate"] += 1
                raise DuplicateRequestError(
                    f"request {request.request_id!r} exists with another prompt, parameters or priority; "
                    "use a new request_id"
                )
            return
        if self.is_draining:
            self.meters.rejected["draining"] += 1
            raise UnavailableError("the service is draining and takes no new requests; retry, or ask another one")
        if len(self.queue) >= self.config.max_queue:
            self.meters.rejected["queue_full"] += 1
            raise OverloadedError(
                f"{len(self.queue)} requests wait for a replica and at most {self.config.max_queue} may; retry later"
            )
        self._num_orders += 1
        choices = [Choice(request.num_prompt_tokens, output) for output in self._new_outputs(request.params)]
        deadline = None if request.deadline_s is None else now + request.deadline_s
        job = Job(request, choices, self._num_orders, now, deadline)
        self.jobs[request.request_id] = job
        self.meters.prompt_tokens += request.num_prompt_tokens
        if deadline is not None:
            heapq.heappush(self._timers, (deadline, request.request_id))
        self._enqueue([job])

    def _attach(self, job: Job) -> None:
        if job.readers >= MAX_READERS:
            self.meters.rejected["readers"] += 1
            raise OverloadedError(
                f"request {job.request.request_id!r} has {job.readers} readers and at most {MAX_READERS} may follow it"
            )
        job.readers += 1
        job.cancel_at = None

    def _detach(self, job: Job, now: float) -> None:
        job.readers -= 1
        if job.readers or job.state == "finished" or job.request.on_disconnect == "detach":
            return
        if job.request.on_disconnect == "cancel_after_grace":
            job.cancel_at = now + self.config.detach_grace_s
            heapq.heappush(self._timers, (job.cancel_at, job.request.request_id))
        else:
            self._end(job, "cancelled", now)

    # Engines

    def _receive(self, link: int, frame: Frame, now: float) -> None:
        if isinstance(frame, Hello):
            self._enqueue(self._fleet.hello(link, frame, now))
            return
        replica = self._fleet.live(link)
        if replica is None:
            self.meters.fenced["incarnation"] += 1
            return
        match frame:
            case TokenEvents():
                for row in frame.rows:
                    self._take(replica, row, now)
            case Heartbeat():
                replica.heartbeat = frame
                replica.last_heartbeat_at = now
            case Failed():
                self._enqueue(self._fleet.failed(replica, frame))
            case ScaleState():
                self.scaling.report(replica, frame)
            case ScaleEstimate():
                self.scaling.answer(replica, frame)
            case _:
                self.meters.fenced["kind"] += 1

    def _take(self, replica: Replica, row: TokenRow, now: float) -> None:
        job = self.jobs.get(row.job)
        if job is None or row.epoch != job.epoch or not 0 <= row.choice < len(job.choices):
            self.meters.fenced["epoch"] += 1
            return
        choice = job.choices[row.choice]
        if choice.finish is not None:
            self.meters.fenced["finished"] += 1
            return
        is_first = not any(other.num_tokens for other in job.choices)
        num_known = choice.num_tokens
        if choice.take(row, now) == "repeated":
            self.meters.fenced["position"] += 1
            return
        self._note_gap(job, now)
        self.meters.output_tokens += choice.num_tokens - num_known
        if is_first and choice.num_tokens:
            job.fingerprint = replica.fingerprint
            self.meters.time_to_first_token_s.observe(now - job.submitted_at)
        self._emit(Changed(row.job))
        if choice.finish is None:
            return
        replica.num_choices -= 1
        self._count_finish(choice)
        if row.finish is None:
            # A stop string, or a row that was held: the engine may not know that the choice has ended.
            self._send(replica, Abort(row.job, job.epoch, row.choice))
        if job.num_open == 0:
            replica.remove(job)
            self._retire(job, now)

    def _note_gap(self, job: Job, now: float) -> None:
        if not any(choice.held for choice in job.choices):
            job.gap_since = None
            self._gaps.discard(job.request.request_id)
        elif job.gap_since is None:
            job.gap_since = now
            self._gaps.add(job.request.request_id)

    # Placement

    def _enqueue(self, jobs: list[Job]) -> None:
        for job in jobs:
            self._gaps.discard(job.request.request_id)
            insort(self.queue, job, key=lambda waiting: waiting.queue_key)
            self._emit(Changed(job.request.request_id))

    def _place_queued(self, now: float) -> None:
        waiting = []
        loads = self._loads() if self.queue else ()
        for position, job in enumerate(self.queue):
            if not any(load.num_choices < load.max_choices for load in loads):
                waiting += self.queue[position:]
                break
            num_tokens = job.request.num_prompt_tokens + (job.request.params.max_tokens or 0)
            decision = self._decide(least_load.PlacementView(num_tokens, job.fingerprint, loads), now)
            if decision.replica is None:
                waiting.append(job)
            else:
                self._place(job, self.replicas[decision.replica])
                loads = self._loads()
        self.queue[:] = waiting

    def _loads(self) -> tuple[least_load.ReplicaLoad, ...]:
        return tuple(
            replica.load(self.config.max_choices) for replica in self.replicas.values() if replica.state == "ready"
        )

    def _place(self, job: Job, replica: Replica) -> None:
        self._num_epochs += 1
        replica.add(job, self._num_epochs)
        self._send(replica, job.place())
        self._emit(Changed(job.request.request_id))

    # Ends

    def _end(self, job: Job, reason: FinishReason, now: float) -> None:
        """Finish what is still open, wherever the job is."""
        if job.state == "finished":
            return
        request_id = job.request.request_id
        if job.replica is None:
            self.queue.remove(job)
        else:
            self._send(self.replicas[job.replica], Abort(request_id, job.epoch))
            self.replicas[job.replica].remove(job)
        for choice in job.choices:
            if choice.finish is None:
                choice.end(reason)
                self._count_finish(choice)
        self._retire(job, now)

    def _retire(self, job: Job, now: float) -> None:
        """All choices have ended: the job stays for reading only."""
        job.finished_at = now
        self._gaps.discard(job.request.request_id)
        self._retained.append(job)
        self.meters.request_duration_s.observe(now - job.submitted_at)
        self._emit(Changed(job.request.request_id))
        self._report_drained()

    def _count_finish(self, choice: Choice) -> None:
        assert choice.finish is not None
        self.meters.finished[choice.finish.reason] += 1
        if choice.num_tokens > 1:
            seconds = choice.last_token_s - choice.first_token_s
            self.meters.time_per_output_token_s.observe(seconds / (choice.num_tokens - 1))

    def _report_drained(self) -> None:
        if self.is_draining and self.num_live == 0:
            self._emit(Drained())

    # Time

    def _tick(self, now: float) -> None:
        stall_s = 0.0 if self._last_tick_at is None else now - self._last_tick_at
        self._last_tick_at = now
        if stall_s > STALL_S:
            self._fleet.excuse(stall_s)
        self._enqueue(self._fleet.lapsed(self.config.lease_s, now))
        self._close_gaps(now)
        while self._timers and self._timers[0][0] <= now:
            job = self.jobs.get(heapq.heappop(self._timers)[1])
            if job is not None and job.deadline is not None and job.deadline <= now:
                self._end(job, "deadline", now)
            elif job is not None and job.cancel_at is not None and job.cancel_at <= now:
                self._end(job, "cancelled", now)
        self._forget(now)

    def _close_gaps(self, now: float) -> None:
        """Rows that wait for one that does not come: ask for the job again, under a new epoch."""
        for request_id in sorted(self._gaps):
            job = self.jobs[request_id]
            if job.replica is None or job.gap_since is None or now - job.gap_since <= self.config.lease_s:
                continue
            self.meters.migrations["gap"] += 1
            self._send(self.replicas[job.replica], Abort(request_id, job.epoch))
            self.replicas[job.replica].remove(job)
            self._enqueue([job])

    def _forget(self, now: float) -> None:
        """Drop finished jobs that are old or too many, but none that is being read."""
        for _ in range(len(self._retained)):
            job = self._retained[0]
            assert job.finished_at is not None
            if len(self._retained) <= self.config.retain_jobs and now - job.finished_at < self.config.retain_s:
                return
            self._retained.popleft()
            if job.readers:
                self._retained.append(job)
            else:
                del self.jobs[job.request.request_id]

    def _send(self, replica: Replica, frame: Frame) -> None:
        if replica.link is not None:
            self._emit(Send(replica.link, frame))

    def _emit(self, effect: Effect) -> None:
        self._effects.append(effect)
