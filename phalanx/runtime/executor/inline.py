"""One rank in the engine's own process."""

import os
import socket
import time
from collections import deque

import torch

from phalanx.parallel import rendezvous
from phalanx.runtime.executor.executor import HasFileno
from phalanx.runtime.pending_result import PendingResult
from phalanx.runtime.plan import Ready, StepPlan, StepResult
from phalanx.runtime.rank_spec import RankSpec
from phalanx.runtime.worker import Worker, warm_up


class InlineExecutor:
    """Executes a plan where it is submitted; on CUDA that only launches it."""

    def __init__(self, spec: RankSpec) -> None:
        begun = time.monotonic()
        if spec.num_threads:
            torch.set_num_threads(spec.num_threads)
        device = torch.device("cuda", torch.cuda.current_device()) if spec.device == "cuda" else torch.device("cpu")
        self._worker = Worker(spec, rendezvous.single(device))
        loaded = time.monotonic()
        warm_up(self._worker)
        phases = {"load": loaded - begun, "warm_up": time.monotonic() - loaded}
        self.ready = [Ready(0, spec.digest, socket.gethostname(), os.getpid(), str(device), "", phases)]
        self._launched: deque[PendingResult] = deque()

    def submit(self, plan: StepPlan) -> None:
        """Run the step."""
        result = self._worker.execute(plan)
        assert result is not None, "a single rank reports"
        self._launched.append(result)

    def poll(self, timeout_s: float, wake: HasFileno | None = None) -> list[StepResult]:
        """The oldest launched step's result."""
        return [self._launched.popleft().wait()] if self._launched else []

    def close(self) -> None:
        """Nothing to end."""
        self._launched.clear()
