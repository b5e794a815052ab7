"""Several hosts on one machine: `Lab` makes the nodes, runs processes in them, and shapes the links between them.

    with Lab(2, link=LinkSpec(delay_s=1e-3, rate=25e6)) as lab:
        server = lab.popen(0, [sys.executable, "server.py", lab.nodes[0].address])
        lab.popen(1, [sys.executable, "client.py", lab.nodes[0].address]).wait()
        print(lab.counters().bytes[1][0])

A node is a network namespace: it has its own `lo` (the fast path between its processes) and `tun0`, nothing else, and
shares files, memory and CPUs with all others. Nothing outlives the lab, and a killed owner ends it too: everything in
the namespaces is killed and they vanish. To look inside by hand: `nsenter --net=<lab.nodes[0].namespace> bash`.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.netlab import namespaces
from tests.netlab.emulator import LinkSpec

ROOT = Path(__file__).parents[2]
EXIT_S = 15.0
MAX_NODES = 254

why_not = namespaces.why_not


@dataclass(frozen=True, slots=True)
class Node:
    """Where one node is. Can be sent to other processes, which then `enter` by themselves."""

    index: int
    address: str
    namespace: str

    def enter(self) -> None:
        """Move the calling thread here for good. For the first line of a process; threads it has already stay."""
        namespaces.enter(self.namespace)

    def inside(self) -> AbstractContextManager[None]:
        """Move the calling thread here for a while: sockets and processes it makes meanwhile stay here."""
        return namespaces.inside(self.namespace)


@dataclass(frozen=True, slots=True)
class Counters:
    """Matrices [source][destination] of what nodes have sent to each other; `bytes` are IP packets with headers."""

    packets: list[list[int]]
    bytes: list[list[int]]
    dropped: list[list[int]]

    @property
    def total_bytes(self) -> int:
        """Over all links."""
        return sum(map(sum, self.bytes))


class Lab:
    """Context manager: `num_nodes` nodes, every two of them joined in both directions by `link`.

    Args:
        num_nodes: 1 to 254.
        link: of every direction; None = no delay, no limit.
        seed: of the losses.

    Raises:
        OSError: the machine cannot do this; `why_not` says so beforehand.
    """

    def __init__(self, num_nodes: int, *, link: LinkSpec | None = None, seed: int = 0) -> None:
        if not 1 <= num_nodes <= MAX_NODES:
            raise ValueError(f"a lab of {num_nodes} nodes; 1 to {MAX_NODES} fit into its /24 network")
        # Any would do, a namespace has all addresses to itself; this one tells labs apart in logs.
        high, low = divmod(os.getpid() % 2**15, 256)
        self._addresses = [f"10.{high}.{low}.{node + 1}" for node in range(num_nodes)]
        self._options = {"addresses": self._addresses, "link": asdict(link or LinkSpec()), "seed": seed}
        self._children: list[subprocess.Popen[Any]] = []
        self.nodes: tuple[Node, ...] = ()

    def __enter__(self) -> Self:
        self._control, theirs = socket.socketpair()
        self._replies = self._control.makefile("rb")
        try:
            with theirs:
                # Its own session: a Ctrl-C of the terminal must not end the network before its users.
                self._emulator = subprocess.Popen(
                    [sys.executable, "-m", "tests.netlab.emulator", json.dumps(self._options)],
                    stdin=theirs.fileno(),
                    stderr=subprocess.PIPE,
                    text=True,
                    cwd=ROOT,
                    start_new_session=True,
                )
            paths = self._reply()
        except BaseException:
            self.close()
            raise
        self.nodes = tuple(Node(index, *place) for index, place in enumerate(zip(self._addresses, paths, strict=True)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def popen(
        self, node: int, argv: Sequence[str], *, env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a process in a node. It is killed at the end of the lab, and so is whatever it starts, detached or not.

        Args:
            node: index of the node.
            argv: the command.
            env: added to this process's environment and to what makes gloo and NCCL use the node's address.
            options: of subprocess.Popen.
        """
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": namespaces.DEVICE, "NCCL_SOCKET_IFNAME": namespaces.DEVICE}
        with self.nodes[node].inside():
            child = subprocess.Popen(list(argv), env=environment | (env or {}), **options)
        self._children.append(child)
        return child

    def kill(self, node: int) -> None:
        """End all processes of a node at once, as a power cut does; its network stays.

        Raises:
            OSError: some did not end.
        """
        where = {namespaces.identity(self.nodes[node].namespace)}
        if left := namespaces.kill_processes(where, spare={os.getpid()}):
            raise OSError(f"processes {left} of node {node} did not end")

    def set_link(self, link: LinkSpec, *, src: int | None = None, dst: int | None = None) -> None:
        """Change one direction; None = from or to every node. Holds for packets under way too, but for their delay."""
        self._ask({"do": "set", "src": src, "dst": dst, "link": asdict(link)})

    def link(self, src: int, dst: int) -> LinkSpec:
        """What a direction is like now."""
        return LinkSpec(**self._ask({"do": "links"})["links"][src][dst])

    def counters(self, *, reset: bool = False) -> Counters:
        """What was sent since the start or the last reset."""
        return Counters(**self._ask({"do": "reset" if reset else "counters"}))

    def close(self) -> None:
        """End everything in the nodes, then the nodes; safe to call twice."""
        self._replies.close()
        self._control.close()
        if emulator := getattr(self, "_emulator", None):
            _, errors = emulator.communicate(timeout=EXIT_S)
            del self._emulator
            if errors:
                sys.stderr.write(errors)
        for child in self._children:
            child.wait(EXIT_S)
        self._children.clear()

    def _ask(self, request: dict[str, Any]) -> Any:
        with contextlib.suppress(ConnectionError):
            self._control.sendall(json.dumps(request).encode() + b"\n")
        return self._reply()

    def _reply(self) -> Any:
        line = b""
        with contextlib.suppress(ConnectionError):
            line = self._replies.readline()
        if not line:
            raise OSError(f"the link emulator ended:\n{self._emulator.communicate()[1]}")
        return json.loads(line)
