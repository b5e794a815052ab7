"""Ranks that join a running engine: late, silent, dead before they dial, no longer wanted. Under 3 s."""

import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import pytest

from phalanx.runtime import plan as messages
from phalanx.runtime import rank_link
from phalanx.runtime.executor import link
from phalanx.runtime.executor.executor import Came, Event, Lost
from phalanx.runtime.executor.link import LinkExecutor
from phalanx.runtime.plan import Ping, Ready
from phalanx.runtime.rank_link import RankListener
from tests.runtime.fake_ranks import make_config

KEY = b"k" * 32
CONFIG = make_config(dp=1)
LATE = 1


class Cluster:
    """An executor with one rank up, and what the ranks' ends of the links are."""

    def __init__(self) -> None:
        self.listener = RankListener("127.0.0.1", KEY)
        self.dead: dict[int, str] = {}
        self.ends: list[Connection] = []
        threading.Thread(target=self._be_first, daemon=True).start()
        specs = CONFIG.rank_specs("", ["here"])
        self.executor = LinkExecutor(self.listener, 1, lambda _: specs, find_dead=lambda: self.dead)
        self.spec = specs[0]

    def dial(self, rank: int) -> Connection:
        self.ends.append(rank_link.connect(self.listener.address, KEY, rank, "here"))
        return self.ends[-1]

    def until(self, is_there: Callable[[list[Event]], bool], limit_s: float = 5.0) -> list[Event]:
        """Events until those so far are what the caller waits for; rank 0 goes on pinging."""
        events: list[Event] = []
        deadline = time.monotonic() + limit_s
        while not is_there(events):
            assert time.monotonic() < deadline, f"only {events}"
            self.ends[0].send_bytes(messages.encode(Ping(0)))
            events += self.executor.poll(0.01)
        return events

    def _be_first(self) -> None:
        end = self.dial(0)
        end.recv_bytes()
        end.send_bytes(ready(0))


def ready(rank: int) -> bytes:
    return messages.encode(Ready(rank, "", "here", 1, "cpu", "", {}))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.executor.close()
    for end in made.ends:
        end.close()


def test_loading_may_be_silent(cluster, monkeypatch):
    """Importing torch takes seconds in which no ping leaves: it is no freezing. A rank that is ready must ping."""
    monkeypatch.setattr(link, "SILENCE_S", 0.2)
    cluster.executor.grow([LATE])
    late = cluster.dial(LATE)
    assert cluster.until(bool) == [Came(LATE, "here")]
    stop = time.monotonic() + 0.6
    assert cluster.until(lambda _: time.monotonic() > stop) == []
    late.send_bytes(ready(LATE))
    loaded, lost = cluster.until(lambda events: len(events) == 2)
    assert isinstance(loaded, Ready)
    assert isinstance(lost, Lost)
    assert lost.rank == LATE
    assert "silent" in lost.reason


def test_freezing_while_loading(cluster, monkeypatch):
    """Found, too, only later: the operation that waits for the rank ends long before its deadline."""
    monkeypatch.setattr(link, "LOADING_SILENCE_S", 0.3)
    cluster.executor.grow([LATE])
    late = cluster.dial(LATE)
    assert cluster.until(bool) == [Came(LATE, "here")]
    stop = time.monotonic() + 0.6
    while time.monotonic() < stop:
        late.send_bytes(messages.encode(Ping(LATE)))
        assert cluster.executor.poll(0.01) == []
        cluster.ends[0].send_bytes(messages.encode(Ping(0)))
    (lost,) = cluster.until(bool)
    assert isinstance(lost, Lost)
    assert "silent for 0." in lost.reason
    assert "limit 0.3 s" in lost.reason


def test_death_before_dialling(cluster):
    """Nothing but its process tells of it; waiting for it would end by the operation's deadline alone."""
    cluster.executor.grow([LATE])
    cluster.dead[LATE] = "rank 1 (pid 7) exited with status 1"
    assert cluster.until(bool) == [Lost(LATE, "rank 1 (pid 7) exited with status 1 before it could dial")]


@pytest.mark.parametrize("dials_first", [True, False])
def test_no_longer_wanted(cluster, dials_first):
    """Its operation was undone before the engine had seen it: its link ends, now or when it comes."""
    cluster.executor.grow([LATE])
    late = None
    if dials_first:
        late = cluster.dial(LATE)
        time.sleep(0.1)  # the engine's end of the handshake
    cluster.executor.drop([LATE])
    end = late or cluster.dial(LATE)
    assert end.poll(5.0), "the link stays open"
    with pytest.raises((EOFError, ConnectionResetError)):
        end.recv_bytes()
