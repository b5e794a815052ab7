"""The supervisor's link over real sockets, cut and refused: nothing that was said is lost (two seconds)."""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from phalanx.deploy.server import supervise
from phalanx.deploy.server.links import SUPERVISE_METHOD
from phalanx.deploy.server.supervise import EndRanks, GrowFailed, ReplicaGone, ReplicaStarting, SupervisorHello
from phalanx.deploy.supervise_link import SuperviseLink
from phalanx.runtime.frames import VERSION

HELLO = SupervisorHello(VERSION)


class FakeController(grpc.GenericRpcHandler):
    """Keeps the frames of each connection apart; `cut` ends the present one with an error."""

    def __init__(self) -> None:
        self.connections: queue.Queue[queue.Queue[Any]] = queue.Queue()
        self.is_alive = True
        self._cut = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        assert details.method == SUPERVISE_METHOD
        return grpc.stream_stream_rpc_method_handler(self._connected)

    def _connected(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        received: queue.Queue[Any] = queue.Queue()
        self.connections.put(received)
        threading.Thread(target=self._receive, args=(requests, received), daemon=True).start()
        yield supervise.encode(EndRanks(0, 1, [1]))
        self._cut.wait(20)
        self._cut.clear()
        context.abort(grpc.StatusCode.UNAVAILABLE, "GOAWAY: too_many_pings")

    def _receive(self, requests: Iterator[bytes], received: "queue.Queue[Any]") -> None:
        try:
            for data in requests:
                received.put(supervise.decode(data))
        except grpc.RpcError:
            return

    def cut(self) -> None:
        self._cut.set()

    def close(self) -> None:
        self._cut.set()
        self._server.stop(0)


@pytest.fixture
def controller() -> Iterator[FakeController]:
    controller = FakeController()
    yield controller
    controller.close()


class Heard:
    def __init__(self, controller: FakeController) -> None:
        self.orders: queue.Queue[Any] = queue.Queue()
        self.ended = threading.Event()
        self.link = SuperviseLink(controller.address, self.orders.put, self.ended.set, lambda: controller.is_alive)


def take(connection: "queue.Queue[Any]", count: int) -> list[Any]:
    return [connection.get(timeout=10) for _ in range(count)]


def test_what_was_said_is_said_again(controller: FakeController) -> None:
    heard = Heard(controller)
    said = [ReplicaStarting(0, 4), ReplicaStarting(1, 2), GrowFailed(0, 4, "grow", "no room")]
    for frame in said:
        heard.link.say(frame)
    assert take(controller.connections.get(timeout=10), 4) == [HELLO, *said]
    assert heard.orders.get(timeout=10) == EndRanks(0, 1, [1])
    controller.cut()
    second = controller.connections.get(timeout=10)
    assert take(second, 4) == [HELLO, *said]
    assert heard.orders.get(timeout=10), "orders come on the new connection"
    for frame in (later := [ReplicaGone(0, 4, "exit", "lost"), ReplicaStarting(0, 5)]):
        heard.link.say(frame)
    assert take(second, 2) == later
    controller.cut()
    assert take(controller.connections.get(timeout=10), 3) == [HELLO, ReplicaStarting(1, 2), ReplicaStarting(0, 5)]
    assert not heard.ended.is_set()
    heard.link.close()
    assert heard.ended.wait(10)


def test_it_ends_with_the_controller(controller: FakeController) -> None:
    heard = Heard(controller)
    controller.connections.get(timeout=10)
    controller.is_alive = False
    controller.cut()
    assert heard.ended.wait(10)


def test_said_while_nobody_answers(controller: FakeController) -> None:
    heard = Heard(controller)
    controller.connections.get(timeout=10)
    controller.close()
    heard.link.say(ReplicaStarting(0, 1))
    assert not heard.ended.wait(0.5), "the controller lives"
    heard.link.close()
    assert heard.ended.wait(10)
