"""One rank in the engine's own process."""

import os
import socket
import time
from collections import deque
from collections.abc import Sequence

import torch

from phalanx.errors import ConfigError
from phalanx.parallel import rendezvous
from phalanx.runtime.executor.executor import Event, HasFileno
from phalanx.runtime.pending_result import PendingResult
from phalanx.runtime.plan import Order, RankMessage, Ready, StepPlan
from phalanx.runtime.rank_spec import RankSpec
from phalanx.runtime.worker import Worker, warm_up


class InlineExecutor:
    """Executes a plan where it is submitted; on CUDA that only launches it."""

    def __init__(self, spec: RankSpec) -> None:
        begun = time.monotonic()
        if spec.num_threads:
            torch.set_num_threads(spec.num_threads)
        device = torch.device("cuda", torch.cuda.current_device()) if spec.device == "cuda" else torch.device("cpu")
        self._messages: deque[RankMessage] = deque()
        self._worker = Worker(spec, rendezvous.single(device), self._messages.append)
        loaded = time.monotonic()
        warm_up(self._worker)
        phases = {"load": loaded - begun, "warm_up": time.monotonic() - loaded}
        node = socket.gethostname()
        self.ready = {0: Ready(0, spec.digest, node, os.getpid(), str(device), "", phases)}
        self.nodes, self.members = {0: node}, {0}
        self.spare: set[int] = set()
        self._launched: deque[PendingResult] = deque()

    def submit(self, plan: StepPlan) -> None:
        """Run the step."""
        result = self._worker.execute(plan)
        assert result is not None, "a single rank reports"
        self._launched.append(result)

    def poll(self, timeout_s: float, wake: HasFileno | None = None) -> list[Event]:
        """The oldest launched step's result, and what the rank had to say beside it."""
        events: list[Event] = [self._messages.popleft() for _ in range(len(self._messages))]
        return [*events, self._launched.popleft().wait()] if self._launched else events

    def send(self, rank: int, order: Order) -> None:
        """A single rank changes no groups."""
        raise ConfigError("a replica of one rank in the engine's own process cannot be scaled; start it with data: 2")

    def grow(self, ranks: Sequence[int]) -> None:
        """Refuse: see `send`."""
        raise ConfigError("a replica of one rank in the engine's own process cannot be scaled; start it with data: 2")

    def brief(self, spec: RankSpec) -> None:
        """No rank can come."""

    def drop(self, ranks: Sequence[int]) -> None:
        """Nothing to end."""

    def close(self) -> None:
        """Leave nothing in flight."""
        self._launched.clear()
        self._worker.close()
