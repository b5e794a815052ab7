"""Request placement: the replica that has the least to do.

Load is what the controller itself has placed and not yet seen finish. A heartbeat is up to 250 ms old, so a burst
judged by heartbeats alone would land on one replica.
"""

from typing import NamedTuple


class ReplicaLoad(NamedTuple):
    """A replica that is up.

    Attributes:
        fingerprint: digest of its resolved plan.
        num_choices: unfinished choices placed on it.
        num_prompt_tokens: prompt tokens of the jobs placed on it.
        max_choices: at this many the replica takes no more.
        max_request_tokens: longest prompt + output its KV pool can hold.
    """

    replica: int
    fingerprint: str
    num_choices: int
    num_prompt_tokens: int
    max_choices: int
    max_request_tokens: int


class PlacementView(NamedTuple):
    """One waiting job and where it could go.

    Attributes:
        num_tokens: prompt + max_tokens of the job.
        fingerprint: the only plan that may continue the job; None while it has no output.
    """

    num_tokens: int
    fingerprint: str | None
    replicas: tuple[ReplicaLoad, ...]


class Decision(NamedTuple):
    """Where the job goes; None = it waits."""

    replica: int | None


def decide(view: PlacementView, now: float) -> Decision:
    """Pick the replica with the fewest unfinished choices, then the fewest prompt tokens, then the lowest number.

    A replica whose KV pool is too small for the job is taken only when all are: its engine then refuses the job with
    a sentence. `now` (seconds, monotonic) is not used by this policy.
    """
    matching = [load for load in view.replicas if view.fingerprint in (None, load.fingerprint)]
    fitting = [load for load in matching if load.max_request_tokens >= view.num_tokens] or matching
    open_replicas = [load for load in fitting if load.num_choices < load.max_choices]
    if not open_replicas:
        return Decision(None)
    best = min(open_replicas, key=lambda load: (load.num_choices, load.num_prompt_tokens, load.replica))
    return Decision(best.replica)
