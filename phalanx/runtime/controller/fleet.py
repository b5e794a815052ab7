"""Which incarnation of which replica is live: hellos, links, leases, fences, and what the supervisor has to do.

Every way to lose a replica ends in `_lose`: fence first, then ask for the processes to be reclaimed. Nothing waits
for the reclaim, because a fenced incarnation cannot be heard any more. Methods that can lose a replica return the jobs
that have left it.
"""

from collections.abc import Callable
from typing import NamedTuple

from phalanx.runtime.controller.events import Close, Effect, Reclaim, ReplicaGone, ReplicaStarting, Send, Start
from phalanx.runtime.controller.jobs import Job
from phalanx.runtime.controller.meters import Meters
from phalanx.runtime.controller.replicas import Replica
from phalanx.runtime.frames import VERSION, Failed, Hello, Shutdown, Welcome


class Sender(NamedTuple):
    """Who is at the other end of a link, as its Hello said."""

    replica: int
    incarnation: int


class Fleet:
    """All replicas, by number; `emit` takes the effects."""

    def __init__(self, meters: Meters, emit: Callable[[Effect], None]) -> None:
        self.replicas: dict[int, Replica] = {}
        self._meters = meters
        self._emit = emit
        self._senders: dict[int, Sender] = {}

    def live(self, link: int) -> Replica | None:
        """The replica whose live incarnation speaks on this link, or None: the message does not count."""
        sender = self._senders.get(link)
        if sender is None or not self.replicas[sender.replica].accepts(sender.incarnation):
            return None
        return self.replicas[sender.replica]

    def hello(self, link: int, hello: Hello, now: float) -> list[Job]:
        """Accept the newest incarnation, once; answer every other one with Shutdown."""
        replica = self._replica(hello.replica)
        if link in self._senders:
            refusal = "a second Hello on one link"
        elif hello.version != VERSION:
            refusal = f"frames of version {hello.version}; the controller speaks version {VERSION}"
        elif hello.incarnation < replica.incarnation:
            refusal = f"incarnation {hello.incarnation} is fenced; the newest is {replica.incarnation}"
        elif hello.incarnation == replica.incarnation and replica.hello is not None:
            refusal = f"incarnation {hello.incarnation} has connected before, and a number is used once"
        else:
            jobs = self._lose(replica, "replaced", f"incarnation {hello.incarnation} took over")
            self._senders[link] = Sender(hello.replica, hello.incarnation)
            replica.connect(link, hello, now)
            self._emit(Send(link, Welcome(VERSION, hello.incarnation)))
            return jobs
        self._meters.fenced["hello"] += 1
        self._emit(Send(link, Shutdown(refusal)))
        self._emit(Close(link))
        return []

    def disconnected(self, link: int, error: str) -> list[Job]:
        """A link ended, whoever ended it."""
        replica = self.live(link)
        self._senders.pop(link, None)
        return [] if replica is None else self._lose(replica, "link", error)

    def failed(self, replica: Replica, frame: Failed) -> list[Job]:
        """An engine spoke its last words."""
        where = f"rank {frame.rank} on {frame.node}, log {frame.log_path}:\n" if frame.rank >= 0 else ""
        return self._lose(replica, "failed", where + frame.error)

    def lapsed(self, lease_s: float, now: float) -> list[Job]:
        """Fence every replica that has been silent for longer than its lease."""
        jobs = []
        for replica in self.replicas.values():
            silent_s = now - replica.last_heartbeat_at
            if replica.state == "ready" and silent_s > lease_s:
                jobs += self._lose(replica, "lease", f"no heartbeat for {silent_s:.1f} s; the lease is {lease_s:g} s")
        return jobs

    def excuse(self, stall_s: float) -> None:
        """The controller itself slept: heartbeats of that time wait unread, so no lease may end because of it."""
        for replica in self.replicas.values():
            replica.last_heartbeat_at += stall_s

    def starting(self, event: ReplicaStarting) -> list[Job]:
        """The supervisor allocated an incarnation; all below it are fenced. It waits for the size to start with."""
        replica, jobs = self._replica(event.replica), []
        if event.incarnation > replica.incarnation:
            jobs = self._lose(replica, "replaced", f"incarnation {event.incarnation} is starting")
            replica.begin(event.incarnation)
        # Fixed now: what a fenced incarnation says about its size is not heard any more.
        self._emit(Start(replica.replica, event.incarnation, replica.size))
        return jobs

    def gone(self, event: ReplicaGone) -> list[Job]:
        """The supervisor saw the processes of an incarnation end."""
        replica = self._replica(event.replica)
        if event.incarnation < replica.incarnation:
            return []
        if event.incarnation > replica.incarnation:
            replica.begin(event.incarnation)
        jobs = self._lose(replica, event.cause, event.error)
        replica.state = "lost"
        replica.error = event.error
        replica.reclaim = None
        return jobs

    def supervised(self) -> None:
        """A supervisor connected: repeat what is still to be reclaimed."""
        for replica in self.replicas.values():
            if replica.reclaim is not None:
                self._emit(Reclaim(replica.replica, replica.incarnation, replica.reclaim))

    def check(self) -> None:
        """All invariants, O(jobs)."""
        for number, replica in self.replicas.items():
            assert replica.replica == number
            replica.check()
            if replica.link is not None:
                assert self._senders[replica.link] == Sender(number, replica.incarnation)

    def _replica(self, number: int) -> Replica:
        return self.replicas.setdefault(number, Replica(number))

    def _lose(self, replica: Replica, cause: str, error: str) -> list[Job]:
        if replica.link is None:
            return []
        self._emit(Send(replica.link, Shutdown(f"fenced: {error}")))
        self._emit(Close(replica.link))
        jobs = replica.lose(error)
        replica.reclaim = cause
        self._emit(Reclaim(replica.replica, replica.incarnation, cause))
        self._meters.losses[cause] += 1
        self._meters.migrations[cause] += len(jobs)
        return jobs
