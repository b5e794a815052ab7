"""A port of a node made reachable from outside it, for clients in a process that must stay where it is.

Moving a thread into a node (`Node.inside`) does not move threads that a library started earlier, such as those of gRPC.
"""

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self

from tests.netlab.lab import Node

CHUNK = 1 << 16


class Forward:
    """Context manager: `address` on this process's loopback leads to `host:port` as seen inside the node."""

    def __init__(self, node: Node, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._node = node
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:" + str(self._listener.getsockname()[1])
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cut all connections and stop listening."""
        _shut(self._listener)
        for end in list(self._open):
            _shut(end)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                ours, _ = self._listener.accept()
            except OSError:
                return
            try:
                with self._node.inside():
                    theirs = socket.create_connection(self._target)
            except OSError:
                ours.close()  # as a refused connection looks to the client: it ends at once
                continue
            self._open |= {ours, theirs}
            ends = [ours, theirs]
            for source, sink in ((ours, theirs), (theirs, ours)):
                sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._threads.append(threading.Thread(target=self._copy, args=(source, sink, ends), daemon=True))
                self._threads[-1].start()

    def _copy(self, source: socket.socket, sink: socket.socket, ends: list[socket.socket]) -> None:
        try:
            while data := source.recv(CHUNK):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            _shut(source)
            _shut(sink)
        ends.remove(source)
        if not ends:  # both directions have ended
            self._open -= {source, sink}
            source.close()
            sink.close()


def _shut(end: socket.socket) -> None:
    """Wake whoever waits on it."""
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
