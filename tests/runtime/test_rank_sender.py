"""What a rank says while a step is on the device. Two seconds."""

import multiprocessing
import threading
from multiprocessing.connection import Connection
from typing import Any

import pytest

from phalanx.runtime import plan, rank
from phalanx.runtime.plan import Ping, StepResult
from phalanx.runtime.rank import Sender


class OnDevice:
    """A result that comes when the test says so, or never."""

    is_ready = False

    def __init__(self, error: Exception | None = None) -> None:
        self.done, self._error = threading.Event(), error

    def wait(self) -> StepResult:
        self.done.wait(10)
        if self._error is not None:
            raise self._error
        return StepResult(7, 0, 0, [], [], [], [], [], 0.0)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(rank, "PING_S", 0.05)
    here, there = multiprocessing.Pipe()
    yield here, there
    here.close()
    there.close()


def received(connection: Connection) -> Any:
    assert connection.poll(5)
    return plan.decode_message(connection.recv_bytes())


def test_it_pings_while_a_step_takes_long(ends: tuple[Connection, Connection]) -> None:
    here, there = ends
    sender, result = Sender(there, 3), OnDevice()
    sender.put(result)  # type: ignore[arg-type]
    for _ in range(5):
        assert received(here) == Ping(3)
    result.done.set()
    while (message := received(here)) == Ping(3):
        pass
    assert message.step == 7
    assert received(here) == Ping(3)
    sender.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_it_falls_silent_when_results_do_not_come_any_more(ends: tuple[Connection, Connection]) -> None:
    here, there = ends
    sender, result = Sender(there, 3), OnDevice(RuntimeError("CUDA error"))
    sender.put(result)  # type: ignore[arg-type]
    assert received(here) == Ping(3)
    result.done.set()
    while here.poll(0.5):
        assert plan.decode_message(here.recv_bytes()) == Ping(3)
    sender.close()
