"""Ranks as child processes of the engine, on one machine, without Ray."""

import contextlib
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator

import msgspec

from phalanx.errors import ReplicaLostError
from phalanx.runtime.executor.executor import HasFileno
from phalanx.runtime.executor.link import LinkExecutor
from phalanx.runtime.plan import Ready, StepPlan, StepResult
from phalanx.runtime.rank import Bootstrap
from phalanx.runtime.rank_link import RankListener
from phalanx.runtime.rank_spec import RankSpec

EXIT_S = 2.0
"""Ranks that have not ended by then, all together, are killed."""


class ProcessExecutor:
    """Starts one process per rank; closing it, or the death of this process, ends them all.

    A process is a fresh interpreter running `phalanx.runtime.rank`, so the caller's program needs no main guard.
    """

    def __init__(self, specs: list[RankSpec]) -> None:
        key = secrets.token_bytes(32)
        listener = RankListener("127.0.0.1", key)
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for spec in specs:
                self._processes.append(_start(Bootstrap(listener.address, key, spec.rank)))
            self._link = LinkExecutor(listener, specs, find_dead=self._find_dead)
        except BaseException:
            self._end()
            raise
        finally:
            listener.close()
        self.ready: list[Ready] = self._link.ready

    def submit(self, plan: StepPlan) -> None:
        """Send the step to every rank."""
        with self._naming_the_dead():
            self._link.submit(plan)

    def poll(self, timeout_s: float, wake: HasFileno | None = None) -> list[StepResult]:
        """Results that have arrived; see `Executor.poll`."""
        with self._naming_the_dead():
            return self._link.poll(timeout_s, wake)

    def close(self) -> None:
        """End the ranks and reap them."""
        self._link.close()
        self._end()

    @contextlib.contextmanager
    def _naming_the_dead(self) -> Iterator[None]:
        try:
            yield
        except ReplicaLostError as error:
            ended = {rank: process.poll() for rank, process in enumerate(self._processes)}
            for process in self._processes:
                process.kill()  # the replica is over, and a frozen rank would not see its link end
            statuses = ", ".join(f"rank {rank}: {status}" for rank, status in ended.items() if status is not None)
            raise ReplicaLostError(f"{error} (exit status: {statuses})" if statuses else str(error)) from error

    def _find_dead(self) -> str | None:
        for rank, process in enumerate(self._processes):
            if process.poll() is not None:
                return f"rank {rank} (pid {process.pid}) exited with status {process.returncode} before it could dial"
        return None

    def _end(self) -> None:
        for process in self._processes:
            assert process.stdin is not None, "opened as a pipe"
            process.stdin.close()
        deadline = time.monotonic() + EXIT_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes = []


def _start(bootstrap: Bootstrap) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen([sys.executable, "-m", "phalanx.runtime.rank"], stdin=subprocess.PIPE)
    assert process.stdin is not None, "opened as a pipe"
    # The pipe stays open: its end tells the rank that this process is gone. The key never shows in a process list.
    process.stdin.write(msgspec.json.encode(bootstrap) + b"\n")
    process.stdin.flush()
    return process
