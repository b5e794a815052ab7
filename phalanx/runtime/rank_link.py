"""The socket between an engine and its ranks: length-prefixed msgpack frames, HMAC-authenticated once.

`multiprocessing.connection.Listener.accept` does its handshake inline and without a timeout, so one silent peer would
block all others: here every handshake runs in a thread of its own with a limit. `recv()` unpickles and is never used.
The key authenticates the handshake only; the link belongs on an internal interface.
"""

import contextlib
import socket
import struct
import threading
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from multiprocessing.context import AuthenticationError
from typing import NamedTuple

from phalanx.errors import ConfigError

HANDSHAKE_S = 5.0

SEND_S = 10.0
"""A peer that takes nothing for this long while the engine sends is frozen: the send fails instead of blocking."""

MAX_MESSAGE_BYTES = 256 * 2**20
MAX_NAME_BYTES = 1024


class Dialled(NamedTuple):
    """A rank that came, and the name of its node: ranks of one node share the name."""

    connection: Connection
    node: str


class RankListener:
    """Accepts the ranks of a replica.

    Args:
        host: interface to listen on.
        key: shared secret of this incarnation.
    """

    def __init__(self, host: str, key: bytes) -> None:
        self._key = key
        try:
            self._socket = socket.create_server((host, 0), backlog=128)
        except OSError as error:
            raise ConfigError(f"cannot listen for ranks on {host} ({error}); use an address of this machine") from error
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        self._ranks: dict[int, Dialled] = {}
        self._refused: set[int] = set()
        self._arrived = threading.Condition()
        threading.Thread(target=self._accept, name="rank-accept", daemon=True).start()

    def take(self, rank: int, timeout_s: float) -> "Dialled | None":
        """A rank, once it has come and proved that it knows the key; None = not in time."""
        with self._arrived:
            self._arrived.wait_for(lambda: rank in self._ranks, timeout_s)
            return self._ranks.pop(rank, None)

    def refuse(self, rank: int) -> None:
        """Close the link of a rank that has dialled but was not taken, or that still will: nobody wants it any more."""
        with self._arrived:
            self._refused.add(rank)
            dialled = self._ranks.pop(rank, None)
        if dialled is not None:
            dialled.connection.close()

    def close(self) -> None:
        """Stop accepting."""
        with contextlib.suppress(OSError):  # closed before
            self._socket.shutdown(socket.SHUT_RDWR)  # closing alone would not wake the thread that accepts
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._handshake, args=(peer,), daemon=True).start()

    def _handshake(self, peer: socket.socket) -> None:
        connection = _connection(peer, HANDSHAKE_S)
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            name = connection.recv_bytes(MAX_NAME_BYTES)
            (rank,) = struct.unpack("<I", name[:4])
            node = name[4:].decode()
        except (OSError, EOFError, AuthenticationError, struct.error, UnicodeDecodeError):
            connection.close()
            return
        _set_timeout(connection.fileno(), 0.0)
        with self._arrived:
            if rank in self._refused:
                connection.close()
                return
            self._ranks[rank] = Dialled(connection, node)
            self._arrived.notify_all()


def connect(address: str, key: bytes, rank: int, node: str) -> Connection:
    """Dial the engine from a rank; inverse of `RankListener.take`.

    Raises:
        OSError, EOFError, AuthenticationError: the engine is not there or does not know the key.
    """
    host, _, port = address.rpartition(":")
    connection = _connection(socket.create_connection((host, int(port)), timeout=HANDSHAKE_S), HANDSHAKE_S)
    answer_challenge(connection, key)
    deliver_challenge(connection, key)
    _set_timeout(connection.fileno(), 0.0)
    connection.send_bytes(struct.pack("<I", rank) + node.encode()[: MAX_NAME_BYTES - 4])
    return connection


def _connection(peer: socket.socket, timeout_s: float) -> Connection:
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(SEND_S), 0))
    descriptor = peer.detach()
    _set_timeout(descriptor, timeout_s)
    return Connection(descriptor)


def _set_timeout(descriptor: int, timeout_s: float) -> None:
    # Connection reads with os.read, which only the kernel's own timeout can interrupt; 0 = none.
    value = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    with socket.socket(fileno=socket.dup(descriptor)) as view:
        view.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
