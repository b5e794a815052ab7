"""Ranks as child processes of the engine, on one machine, without Ray."""

import contextlib
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from phalanx.errors import ReplicaLostError
from phalanx.runtime.executor.executor import Event, HasFileno, Lost
from phalanx.runtime.executor.link import LinkExecutor
from phalanx.runtime.plan import Order, Ready, StepPlan
from phalanx.runtime.rank import Bootstrap
from phalanx.runtime.rank_link import RankListener
from phalanx.runtime.rank_spec import RankSpec

EXIT_S = 2.0
"""Ranks that have not ended by then, all together, are killed."""


class ProcessExecutor:
    """Starts one process per rank; closing it, or the death of this process, ends them all.

    A process is a fresh interpreter running `phalanx.runtime.rank`, so the caller's program needs no main guard.

    Args:
        num_ranks: that run from the start.
        orders: from the nodes of the ranks to their specs.
    """

    def __init__(self, num_ranks: int, orders: Callable[[list[str]], list[RankSpec]]) -> None:
        self._key = secrets.token_bytes(32)
        listener = RankListener("127.0.0.1", self._key)
        self._address = listener.address
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._ending: list[tuple[subprocess.Popen[bytes], float]] = []
        try:
            self._start(range(num_ranks))
            self._link = LinkExecutor(listener, num_ranks, orders, find_dead=self._find_dead)
        except BaseException:
            listener.close()
            self._end(list(self._processes))
            raise
        self.ready: dict[int, Ready] = self._link.ready
        self.nodes: dict[int, str] = self._link.nodes
        self.members: set[int] = self._link.members
        self.spare: set[int] = self._link.spare

    def submit(self, plan: StepPlan) -> None:
        """Send the step to every member."""
        with self._naming_the_dead():
            self._link.submit(plan)

    def send(self, rank: int, order: Order) -> None:
        """Send an order to one rank."""
        with self._naming_the_dead():
            self._link.send(rank, order)

    def poll(self, timeout_s: float, wake: HasFileno | None = None) -> list[Event]:
        """Events that have arrived; see `Executor.poll`."""
        if self._ending:
            self._reap()
        with self._naming_the_dead():
            events = self._link.poll(timeout_s, wake)
        for event in events:
            if isinstance(event, Lost) and event.rank in self._processes:
                self._processes[event.rank].kill()  # a frozen one would hold up the others in their exchanges
        return events

    def grow(self, ranks: Sequence[int]) -> None:
        """Start further processes."""
        self._start(ranks)
        self._link.grow(ranks)

    def brief(self, spec: RankSpec) -> None:
        """Give a rank that came its orders."""
        self._link.brief(spec)

    def drop(self, ranks: Sequence[int]) -> None:
        """End processes without waiting for it: `poll` reaps them."""
        self._link.drop(ranks)
        for rank in ranks:
            if (process := self._processes.pop(rank, None)) is not None:
                _close_stdin(process)
                self._ending.append((process, time.monotonic() + EXIT_S))

    def close(self) -> None:
        """End the ranks and reap them."""
        self._link.close()
        self._end(list(self._processes))

    @property
    def pids(self) -> dict[int, int]:
        """Process id of each rank."""
        return {rank: process.pid for rank, process in self._processes.items()}

    def _start(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            self._processes[rank] = _start(Bootstrap(self._address, self._key, rank))

    @contextlib.contextmanager
    def _naming_the_dead(self) -> Iterator[None]:
        try:
            yield
        except ReplicaLostError as error:
            ended = {rank: process.poll() for rank, process in self._processes.items()}
            for process in self._processes.values():
                process.kill()  # the replica is over, and a frozen rank would not see its link end
            statuses = ", ".join(f"rank {rank}: {status}" for rank, status in ended.items() if status is not None)
            raise ReplicaLostError(f"{error} (exit status: {statuses})" if statuses else str(error)) from error

    def _find_dead(self) -> dict[int, str]:
        return {
            rank: f"rank {rank} (pid {process.pid}) exited with status {process.returncode}"
            for rank, process in self._processes.items()
            if process.poll() is not None
        }

    def _reap(self) -> None:
        for process, deadline in self._ending:
            if time.monotonic() > deadline:
                process.kill()
        self._ending = [(process, deadline) for process, deadline in self._ending if process.poll() is None]

    def _end(self, ranks: Sequence[int]) -> None:
        processes = [self._processes.pop(rank) for rank in ranks]
        for process in processes:
            _close_stdin(process)
        processes += [process for process, _ in self._ending]
        self._ending = []
        deadline = time.monotonic() + EXIT_S
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _close_stdin(process: "subprocess.Popen[bytes]") -> None:
    """Its end tells the rank to end."""
    assert process.stdin is not None, "opened as a pipe"
    process.stdin.close()


def _start(bootstrap: Bootstrap) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen([sys.executable, "-m", "phalanx.runtime.rank"], stdin=subprocess.PIPE)
    assert process.stdin is not None, "opened as a pipe"
    # The pipe stays open: its end tells the rank that this process is gone. The key never shows in a process list.
    process.stdin.write(msgspec.json.encode(bootstrap) + b"\n")
    process.stdin.flush()
    return process
