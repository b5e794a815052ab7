"""A replica as the controller sees it: one live incarnation at most, and the jobs placed on it."""

from dataclasses import dataclass, field
from typing import Literal

from phalanx.runtime.controller.jobs import Job
from phalanx.runtime.frames import Heartbeat, Hello
from phalanx.runtime.policies.least_load import ReplicaLoad

ReplicaState = Literal["starting", "ready", "lost"]


@dataclass(slots=True, eq=False)
class Replica:
    """State of one replica.

    Attributes:
        incarnation: newest one known, live or not.
        link: of the live incarnation; None while none is.
        hello: first frame of the newest incarnation; None until it has connected.
        heartbeat: latest counters, kept after a loss.
        last_heartbeat_at: monotonic; the lease runs from here.
        jobs: placed here, by request id.
        num_choices, num_prompt_tokens: unfinished choices, and prompt tokens, of `jobs`.
        error: last words of the incarnation that was lost last.
        reclaim: cause of the loss while the supervisor has not yet confirmed the end of the processes.
        data: dp ranks that serve, as the newest incarnation said last.
        size: dp ranks that the next incarnation starts with; None = as the plan says.
        ranks: one line each: what runs where.
    """

    replica: int
    incarnation: int = 0
    state: ReplicaState = "starting"
    link: int | None = None
    hello: Hello | None = None
    heartbeat: Heartbeat | None = None
    last_heartbeat_at: float = 0.0
    jobs: dict[str, Job] = field(default_factory=dict)
    num_choices: int = 0
    num_prompt_tokens: int = 0
    error: str | None = None
    reclaim: str | None = None
    data: int = 0
    size: int | None = None
    ranks: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """Digest of the plan it runs; empty before it has connected."""
        return "" if self.hello is None else self.hello.fingerprint

    def accepts(self, incarnation: int) -> bool:
        """Whether a message of this incarnation counts: it is the live one, exactly."""
        return self.state == "ready" and incarnation == self.incarnation

    def begin(self, incarnation: int) -> None:
        """Expect a newer incarnation; the one before must be lost or never have connected."""
        self.incarnation = incarnation
        self.state = "starting"
        self.hello = None
        self.heartbeat = None
        self.reclaim = None

    def connect(self, link: int, hello: Hello, now: float) -> None:
        """The newest incarnation is up."""
        self.begin(hello.incarnation)
        self.state = "ready"
        self.link = link
        self.hello = hello
        self.data, self.ranks = hello.dp_size, hello.ranks
        self.last_heartbeat_at = now

    def lose(self, error: str) -> list[Job]:
        """Fence the live incarnation; returns its jobs, which have left it and have no epoch."""
        self.state = "lost"
        self.link = None
        self.error = error
        jobs = list(self.jobs.values())
        for job in jobs:
            self.remove(job)
        return jobs

    def add(self, job: Job, epoch: int) -> None:
        """Place a job here under a fresh epoch."""
        job.replica = self.replica
        job.epoch = epoch
        self.jobs[job.request.request_id] = job
        self.num_choices += job.num_open
        self.num_prompt_tokens += job.request.num_prompt_tokens

    def remove(self, job: Job) -> None:
        """Take a job away, with the choices it still has open; its epoch ends with it."""
        job.unplace()
        del self.jobs[job.request.request_id]
        self.num_choices -= job.num_open
        self.num_prompt_tokens -= job.request.num_prompt_tokens

    def load(self, max_choices: int) -> ReplicaLoad:
        """What the placement policy may know."""
        return ReplicaLoad(
            self.replica,
            self.fingerprint,
            self.num_choices,
            self.num_prompt_tokens,
            max_choices,
            0 if self.hello is None else self.hello.max_request_tokens,
        )

    def check(self) -> None:
        """All invariants of one replica, O(jobs)."""
        assert (self.state == "ready") == (self.link is not None)
        assert self.state == "ready" or not self.jobs
        assert self.state != "ready" or (self.hello is not None and self.hello.incarnation == self.incarnation)
        assert self.num_choices == sum(job.num_open for job in self.jobs.values())
        assert self.num_prompt_tokens == sum(job.request.num_prompt_tokens for job in self.jobs.values())
        for request_id, job in self.jobs.items():
            assert job.request.request_id == request_id
            assert job.replica == self.replica
            assert job.epoch > 0
            assert job.state == "running"
