"""Ranks behind rank links, whoever started them."""

import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

from phalanx.errors import ConfigError, ReplicaLostError
from phalanx.runtime import plan as messages
from phalanx.runtime.executor.executor import HasFileno
from phalanx.runtime.plan import RankFailed, Ready, StepPlan, StepResult
from phalanx.runtime.rank import CONSEQUENCE
from phalanx.runtime.rank_link import MAX_MESSAGE_BYTES, RankListener
from phalanx.runtime.rank_spec import RankSpec, encode_spec

SILENCE_S = 3.0
"""A rank pings twice a second from a thread of its own: silent for this long = dead or frozen."""

LAST_WORDS_S = 0.5
"""After the first loss: how long to listen for the rank that failed first."""


class LinkExecutor:
    """Plans go to every rank, results come from one rank per dp rank.

    Args:
        listener: where the ranks dial.
        specs: orders of every rank, by rank.
        startup_s: limit for all ranks to be ready.
        find_dead: asked while waiting for ranks: a sentence about one that died before it could dial, or None.

    Raises:
        ReplicaLostError: a rank failed while starting; its traceback is in the message.
        ConfigError: ranks disagree about the plan they serve.
    """

    def __init__(
        self,
        listener: RankListener,
        specs: list[RankSpec],
        *,
        startup_s: float = 600.0,
        find_dead: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._connections: list[Connection] = []
        self._heard: list[float] = []
        self._has_step = False
        self.ready: list[Ready] = []
        deadline = time.monotonic() + startup_s
        try:
            for spec in specs:
                self._connections.append(self._take(listener, spec.rank, deadline, find_dead))
            self._rank_of = {connection: rank for rank, connection in enumerate(self._connections)}
            for spec, connection in zip(specs, self._connections, strict=True):
                connection.send_bytes(encode_spec(spec))
            self.ready = self._await_ready(deadline)
        except BaseException:
            self.close()
            raise
        digests = {ready.rank: ready.digest for ready in self.ready if ready.digest != specs[0].digest}
        if digests:
            self.close()
            raise ConfigError(
                f"ranks {sorted(digests)} serve another plan than rank 0; restart them with the same file"
            )
        self._heard = [time.monotonic()] * len(specs)

    def submit(self, plan: StepPlan) -> None:
        """Send the step to every rank."""
        data = messages.encode(plan)
        for rank, connection in enumerate(self._connections):
            try:
                connection.send_bytes(data)
            except OSError:
                self._lose(rank, None)

    def poll(self, timeout_s: float, wake: HasFileno | None = None) -> list[StepResult]:
        """Results that have arrived; see `Executor.poll`."""
        results = []
        ready = wait([*self._connections, *([wake.fileno()] if wake else [])], timeout_s)
        now = time.monotonic()
        for connection in ready:
            if not isinstance(connection, Connection):
                continue
            rank = self._rank_of[connection]
            message = self._receive(rank)
            self._heard[rank] = now
            if isinstance(message, StepResult):
                results.append(message)
        for rank, heard in enumerate(self._heard):
            if now - heard > SILENCE_S and not self._connections[rank].poll(0):
                raise ReplicaLostError(
                    f"{self._name(rank)} has been silent for {now - heard:.1f} s (limit {SILENCE_S} s): it is frozen, "
                    "or its node is; the replica restarts"
                )
        return results

    def close(self) -> None:
        """Close the links: a rank ends when its link does."""
        for connection in self._connections:
            connection.close()
        self._connections = []

    def _take(
        self, listener: RankListener, rank: int, deadline: float, find_dead: Callable[[], str | None]
    ) -> Connection:
        while time.monotonic() < deadline:
            connection = listener.take(rank, 0.2)
            if connection is not None:
                return connection
            dead = find_dead()
            if dead is not None:
                raise ReplicaLostError(dead)
        raise ReplicaLostError(f"rank {rank} did not dial in time; look at its log")

    def _await_ready(self, deadline: float) -> list[Ready]:
        ready: dict[int, Ready] = {}
        while len(ready) < len(self._connections):
            for connection in wait(self._connections, max(0.0, deadline - time.monotonic())):
                assert isinstance(connection, Connection)
                rank = self._rank_of[connection]
                message = self._receive(rank)
                if isinstance(message, Ready):
                    ready[rank] = message
            if time.monotonic() >= deadline:
                missing = sorted(set(range(len(self._connections))) - set(ready))
                raise ReplicaLostError(f"ranks {missing} were not ready in time; look at their logs")
        return [ready[rank] for rank in range(len(self._connections))]

    def _receive(self, rank: int) -> messages.RankMessage:
        try:
            message = messages.decode_message(self._connections[rank].recv_bytes(MAX_MESSAGE_BYTES))
        except (EOFError, OSError):
            self._lose(rank, None)
        except messages.PlanError as error:
            raise ReplicaLostError(f"{self._name(rank)} sent bytes that are no message: {error}") from error
        if isinstance(message, RankFailed):
            self._lose(rank, message)
        return message

    def _lose(self, rank: int, words: RankFailed | None) -> "None":
        """Raise for the rank that failed first: when one dies, the others fail inside their collectives."""
        lost: dict[int, RankFailed | None] = {rank: words}
        deadline = time.monotonic() + LAST_WORDS_S
        while (left := deadline - time.monotonic()) > 0 and all(_is_consequence(said) for said in lost.values()):
            others = [c for r, c in enumerate(self._connections) if r not in lost and not c.closed]
            for connection in wait(others, left):
                assert isinstance(connection, Connection)
                other = self._rank_of[connection]
                try:
                    message = messages.decode_message(connection.recv_bytes(MAX_MESSAGE_BYTES))
                    if isinstance(message, RankFailed):
                        lost[other] = message
                except (EOFError, OSError):
                    lost[other] = None
        cause = min(lost, key=lambda r: (_is_consequence(lost[r]), lost[r] is None, r))
        said = lost[cause]
        end = f"failed:\n{said.error}" if said else "died without a word"
        raise ReplicaLostError(f"{self._name(cause, said)} {end}")

    def _name(self, rank: int, words: RankFailed | None = None) -> str:
        # A rank that fails while it starts has not been ready: its own last words say where it was.
        known = self.ready[rank] if rank < len(self.ready) else None
        where = known or words
        if where is None:
            return f"rank {rank}"
        pid = f", pid {known.pid}" if known else ""
        return f"rank {rank} (node {where.node}{pid}, log {where.log_path or '-'})"


def _is_consequence(words: RankFailed | None) -> bool:
    return words is not None and words.error.startswith(CONSEQUENCE)
