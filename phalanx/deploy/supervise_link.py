"""The supervisor's link to its controller: dialled again when it breaks, and what has been said is said again."""

import contextlib
import queue
import threading
from collections.abc import Callable

import grpc

from phalanx.deploy.server import supervise
from phalanx.deploy.server.links import LINK_OPTIONS, SUPERVISE_METHOD
from phalanx.runtime.frames import VERSION

REDIAL_S = 0.1

Said = supervise.ReplicaStarting | supervise.ReplicaGone | supervise.GrowFailed


class SuperviseLink:
    """Frames in both directions, from any thread.

    A connection may end while both processes live, and nobody knows then which frames have arrived. So everything said
    about the newest incarnation of each replica is kept and repeated on the next connection; the controller takes it
    twice without harm, and on its side repeats its orders.

    Args:
        address: of the controller's port for engines.
        on_frame: called from the reading thread with each frame.
        on_end: called from it, once, when the link is over: it was closed, or the controller has ended.
        is_alive: whether the controller's process runs.
    """

    def __init__(
        self,
        address: str,
        on_frame: Callable[[supervise.Frame], None],
        on_end: Callable[[], None],
        is_alive: Callable[[], bool],
    ) -> None:
        self._on_frame, self._on_end, self._is_alive = on_frame, on_end, is_alive
        self._lock = threading.Lock()
        self._said: list[Said] = []
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._channel = grpc.insecure_channel(address, options=LINK_OPTIONS)
        threading.Thread(target=self._run, name="supervise-link", daemon=True).start()

    def say(self, frame: Said) -> None:
        """Send a frame on this connection, and on every later one until a newer incarnation of the replica starts."""
        with self._lock:
            if isinstance(frame, supervise.ReplicaStarting):
                self._said = [old for old in self._said if old.replica != frame.replica]
            self._said.append(frame)
            self._outbox.put(supervise.encode(frame))

    def close(self) -> None:
        """End it; what is queued may be lost."""
        self._closed.set()
        with self._lock:
            self._outbox.put(None)
        self._channel.close()

    def _run(self) -> None:
        while not self._closed.is_set() and self._is_alive():
            # After `close` the channel refuses calls with a ValueError.
            with contextlib.suppress(grpc.RpcError, ValueError):
                self._connect()
            self._closed.wait(REDIAL_S)
        self._on_end()

    def _connect(self) -> None:
        """One connection, to its end."""
        outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        with self._lock:
            for frame in (supervise.SupervisorHello(VERSION), *self._said):
                outbox.put(supervise.encode(frame))
            self._outbox = outbox
        try:
            for data in self._channel.stream_stream(SUPERVISE_METHOD)(iter(outbox.get, None)):
                self._on_frame(supervise.decode(data))
        finally:
            outbox.put(None)  # ends the thread of gRPC that waits for it
