"""Ranks behind rank links, whoever started them."""

import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait

from phalanx.errors import ConfigError, ReplicaLostError
from phalanx.runtime import plan as messages
from phalanx.runtime.executor.executor import Came, Event, HasFileno, Lost
from phalanx.runtime.plan import Order, Ping, RankFailed, RankMessage, Ready, StepPlan
from phalanx.runtime.rank import CONSEQUENCE
from phalanx.runtime.rank_link import MAX_MESSAGE_BYTES, Dialled, RankListener
from phalanx.runtime.rank_spec import RankSpec, encode_spec

SILENCE_S = 3.0
"""A rank pings twice a second from a thread of its own: silent for this long = dead or frozen."""

LOADING_SILENCE_S = 120.0
"""The same before a rank is ready: its first ping comes when everything is imported and its unit has met."""

LAST_WORDS_S = 0.5
"""After the first loss: how long to listen for the rank that failed first."""


class LinkExecutor:
    """Plans go to every member, results come from one rank per dp rank.

    Args:
        listener: where the ranks dial; stays open for those that come later, and is closed with this.
        num_ranks: ranks 0 ... num_ranks - 1 are there from the start.
        orders: from the nodes of the ranks to their specs.
        startup_s: limit for all ranks to be ready.
        find_dead: asked while waiting for ranks: a sentence about each rank that has ended by itself.

    Raises:
        ReplicaLostError: a rank failed while starting; its traceback is in the message.
        ConfigError: ranks disagree about the plan they serve.
    """

    def __init__(
        self,
        listener: RankListener,
        num_ranks: int,
        orders: Callable[[list[str]], list[RankSpec]],
        *,
        startup_s: float = 600.0,
        find_dead: Callable[[], dict[int, str]] = dict,
    ) -> None:
        self._listener, self._find_dead = listener, find_dead
        self._connections: dict[int, Connection] = {}
        self._heard: dict[int, float] = {}
        self._expected: set[int] = set()
        self._late: list[Event] = []
        self.ready: dict[int, Ready] = {}
        self.nodes: dict[int, str] = {}
        self.members: set[int] = set(range(num_ranks))
        self.spare: set[int] = set()
        deadline = time.monotonic() + startup_s
        try:
            for rank in range(num_ranks):
                self._admit(rank, self._take(rank, deadline))
            specs = orders([self.nodes[rank] for rank in range(num_ranks)])
            for spec in specs:
                self.brief(spec)
            self._await_ready(deadline)
        except BaseException:
            self.close()
            raise
        digests = sorted(rank for rank, ready in self.ready.items() if ready.digest != specs[0].digest)
        if digests:
            self.close()
            raise ConfigError(f"ranks {digests} serve another plan than rank 0; restart them with the same file")
        first = {spec.pp_rank: self.ready[spec.rank] for spec in reversed(specs)}
        odd = [words for spec in specs if (words := other_rows(self.ready[spec.rank], first[spec.pp_rank]))]
        if odd:
            self.close()
            raise ConfigError(odd[0])
        self._heard = dict.fromkeys(self._connections, time.monotonic())

    def submit(self, plan: StepPlan) -> None:
        """Send the step to every member."""
        data = messages.encode(plan)
        for rank in sorted(self.members):
            self._send(rank, data)

    def send(self, rank: int, order: Order) -> None:
        """Send an order to one rank."""
        self._send(rank, messages.encode(order))

    def brief(self, spec: RankSpec) -> None:
        """Send a rank its orders."""
        self._send(spec.rank, encode_spec(spec))

    def grow(self, ranks: Sequence[int]) -> None:
        """Expect further ranks."""
        self._expected |= set(ranks)
        self.spare |= set(ranks)

    def drop(self, ranks: Sequence[int]) -> None:
        """Close the links of ranks: they end by themselves."""
        for rank in ranks:
            assert rank not in self.members, "a member cannot be dropped"
            if rank in self._expected:
                self._expected.discard(rank)
                self._listener.refuse(rank)
            self._forget(rank)

    def poll(self, timeout_s: float, wake: HasFileno | None = None) -> list[Event]:
        """Events that have arrived; see `Executor.poll`."""
        events: list[Event] = [*self._late, *self._arrivals()]
        self._late = []
        rank_of = {connection: rank for rank, connection in self._connections.items()}
        # New ranks dial the listener, which cannot be waited for here: look again soon.
        patience_s = 0.0 if events else min(timeout_s, 0.02) if self._expected else timeout_s
        ready = wait([*rank_of, *([wake.fileno()] if wake else [])], patience_s)
        now = time.monotonic()
        for connection in ready:
            if isinstance(connection, Connection) and rank_of[connection] in self._connections:
                rank = rank_of[connection]
                message = self._receive(rank)
                if isinstance(message, Ready):
                    self.ready[rank] = message
                if rank in self._connections:
                    self._heard[rank] = now
                if message is not None and not isinstance(message, Ping):
                    events.append(message)
        for rank, heard in list(self._heard.items()):
            limit_s = SILENCE_S if rank in self.ready else LOADING_SILENCE_S
            if now - heard > limit_s and not self._connections[rank].poll(0):
                silence = f"has been silent for {now - heard:.1f} s (limit {limit_s} s): it is frozen, or its node is"
                if rank not in self.spare:
                    raise ReplicaLostError(f"{self._name(rank)} {silence}; the replica restarts")
                self._lose(rank, silence)
        events += self._late
        self._late = []
        return events

    def close(self) -> None:
        """Close the links: a rank ends when its link does."""
        self._listener.close()
        for rank in list(self._connections):
            self._forget(rank)

    def _admit(self, rank: int, dialled: Dialled) -> None:
        self._connections[rank], self.nodes[rank] = dialled
        self._heard[rank] = time.monotonic()

    def _arrivals(self) -> list[Event]:
        arrived: list[Event] = []
        dead = self._find_dead() if self._expected else {}
        for rank in sorted(self._expected):
            dialled = self._listener.take(rank, 0.0)
            if dialled is not None:
                self._expected.discard(rank)
                self._admit(rank, dialled)
                arrived.append(Came(rank, dialled.node))
            elif rank in dead:
                self._expected.discard(rank)
                self._listener.refuse(rank)
                arrived.append(Lost(rank, f"{dead[rank]} before it could dial"))
        return arrived

    def _send(self, rank: int, data: bytes) -> None:
        try:
            self._connections[rank].send_bytes(data)
        except OSError:
            self._fail(rank, None)
        except KeyError:
            assert rank in self.spare, f"rank {rank} is not connected"

    def _take(self, rank: int, deadline: float) -> Dialled:
        while time.monotonic() < deadline:
            dialled = self._listener.take(rank, 0.2)
            if dialled is not None:
                return dialled
            for end in self._find_dead().values():
                raise ReplicaLostError(f"{end} before it could dial")
        raise ReplicaLostError(f"rank {rank} did not dial in time; look at its log")

    def _await_ready(self, deadline: float) -> None:
        rank_of = {connection: rank for rank, connection in self._connections.items()}
        while len(self.ready) < len(rank_of):
            for connection in wait(list(rank_of), max(0.0, deadline - time.monotonic())):
                assert isinstance(connection, Connection)
                message = self._receive(rank_of[connection])
                if isinstance(message, Ready):
                    self.ready[message.rank] = message
            if time.monotonic() >= deadline:
                missing = sorted(set(rank_of.values()) - set(self.ready))
                raise ReplicaLostError(f"ranks {missing} were not ready in time; look at their logs")
        self.ready = dict(sorted(self.ready.items()))

    def _receive(self, rank: int) -> RankMessage | None:
        try:
            message = messages.decode_message(self._connections[rank].recv_bytes(MAX_MESSAGE_BYTES))
        except (EOFError, OSError):
            self._fail(rank, None)
            return None
        except messages.PlanError as error:
            raise ReplicaLostError(f"{self._name(rank)} sent bytes that are no message: {error}") from error
        if isinstance(message, RankFailed):
            self._fail(rank, message)
            return None
        return message

    def _fail(self, rank: int, words: RankFailed | None) -> None:
        if rank in self.spare:
            self._lose(rank, f"failed:\n{words.error}" if words else "died without a word")
        else:
            self._raise_first(rank, words)

    def _lose(self, rank: int, reason: str) -> None:
        """A spare rank is gone."""
        self._late.append(Lost(rank, f"{self._name(rank)} {reason}"))
        self._forget(rank)

    def _forget(self, rank: int) -> None:
        self._heard.pop(rank, None)
        connection = self._connections.pop(rank, None)
        if connection is not None:
            connection.close()

    def _raise_first(self, rank: int, words: RankFailed | None) -> None:
        """Raise for the rank that failed first: when one dies, the others fail inside their collectives."""
        lost: dict[int, RankFailed | None] = {rank: words}
        deadline = time.monotonic() + LAST_WORDS_S
        while (left := deadline - time.monotonic()) > 0 and all(_is_consequence(said) for said in lost.values()):
            others = {c: r for r, c in self._connections.items() if r not in lost and not c.closed}
            for connection in wait(list(others), left):
                assert isinstance(connection, Connection)
                other = others[connection]
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
        known = self.ready.get(rank)
        where = known or words
        if where is None:
            return f"rank {rank}"
        pid = f", pid {known.pid}" if known else ""
        return f"rank {rank} (node {where.node}{pid}, log {where.log_path or '-'})"


def other_rows(ready: Ready, usual: Ready) -> str:
    """Why a rank cannot serve beside another one of its stage, whose expert rows it would have to take; "" = it can."""
    if ready.expert_rows == usual.expert_rows:
        return ""
    here, there = (f"{rank.expert_rows} on rank {rank.rank} (node {rank.node})" for rank in (usual, ready))
    return (
        f"experts are stored as {here} but as {there}; give every node the same CPU features and a C++ compiler, or "
        "choose one back end for all, for example kernels: {experts: loop}"
    )


def _is_consequence(words: RankFailed | None) -> bool:
    return words is not None and words.error.startswith(CONSEQUENCE)
