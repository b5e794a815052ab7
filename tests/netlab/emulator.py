"""A star of network namespaces joined in user space: the process that `tests.netlab.lab.Lab` starts.

Every packet that a node sends comes out of its TUN device, waits in a queue of timed events, and is written into the
device of its destination. Times of a packet of L bytes on an otherwise idle link, with service = cost + L / rate:

    read from tun(src)        leaves src           whole at dst            written to tun(dst)
    |--- service on src's clock ---|--- delay_s ---|--- rest of the service on dst's clock, if dst is busy ---|

Both clocks are one per node (its network card): packets to several nodes queue at the sender, packets from several
nodes queue at the receiver. A receiver that is free takes a packet in while it arrives, so an idle link costs its
service once. Directions are independent. Queues are first in, first out, and unlimited: an acknowledgement waits behind
the data that its node sends, so two long opposite TCP streams do not reach the full rate; single messages do.

Control: JSON lines on the socket given as standard input, one reply per request. At its end all processes in the
namespaces are killed, and nothing is left: a namespace lives as long as a process or a descriptor refers to it.
"""

import contextlib
import heapq
import json
import os
import random
import select
import socket
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from tests.netlab import namespaces

MAX_PACKET = 65536
BURST = 32
"""Packets read from one node before events are looked at again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """One direction between two nodes.

    Args:
        delay_s: propagation; occupies nobody.
        rate: bytes per second of both network cards while they handle this link's packets; None = unlimited.
        packet_s: occupancy of both network cards per packet (the `o` of LogGP).
        loss: probability that a packet vanishes before it is delivered; 1.0 = the link is cut.
    """

    delay_s: float = 0.0
    rate: float | None = None
    packet_s: float = 0.0
    loss: float = 0.0


class Emulator:
    """The queue of packets under way between nodes; `read` and `advance` are the two halves of the loop.

    Args:
        tuns: one descriptor per node, from `namespaces.open_tun`.
        link: of every direction to begin with.
        seed: the fate of the n-th packet of a link depends on it, the link and n alone.
    """

    def __init__(self, tuns: list[int], link: LinkSpec, seed: int) -> None:
        nodes = range(len(tuns))
        self.tuns = tuns
        self.links = [[link for _ in nodes] for _ in nodes]
        self._chance = [[random.Random(f"{seed} {src} {dst}") for dst in nodes] for src in nodes]
        self._sender_free = [0.0 for _ in nodes]
        self._receiver_free = [0.0 for _ in nodes]
        # (time, tie-break, source, destination, packet, is it through the receiver's network card)
        self._events: list[tuple[float, int, int, int, bytes, bool]] = []
        self._sequence = 0
        self.reset()

    def reset(self) -> None:
        """Set all counters to zero."""
        nodes = range(len(self.tuns))
        self.packets = [[0 for _ in nodes] for _ in nodes]
        self.bytes = [[0 for _ in nodes] for _ in nodes]
        self.dropped = [[0 for _ in nodes] for _ in nodes]

    def read(self, src: int) -> None:
        """Take what a node has sent, at most BURST packets, and put it on the sender's clock."""
        tun, links = self.tuns[src], self.links[src]
        for _ in range(BURST):
            try:
                packet = os.read(tun, MAX_PACKET)
            except BlockingIOError:
                return
            now = time.monotonic()
            # IPv4 header: version in the first byte, destination address in bytes 16 to 19, ours end in node + 1.
            dst = packet[19] - 1 if packet[0] >> 4 == 4 else -1
            if not 0 <= dst < len(links) or dst == src:
                continue
            self.packets[src][dst] += 1
            self.bytes[src][dst] += len(packet)
            link = links[dst]
            service_s = link.packet_s + (len(packet) / link.rate if link.rate else 0.0)
            leaves = max(now, self._sender_free[src]) + service_s
            self._sender_free[src] = leaves
            self._push(leaves + link.delay_s, src, dst, packet, False)

    def advance(self) -> float | None:
        """Let everything happen that is due; returns the seconds until the next event, None = nothing is under way."""
        while self._events:
            at = self._events[0][0]
            now = time.monotonic()
            if at > now:
                return at - now
            _, _, src, dst, packet, received = heapq.heappop(self._events)
            if not received:
                link = self.links[src][dst]
                service_s = link.packet_s + (len(packet) / link.rate if link.rate else 0.0)
                done = max(at, self._receiver_free[dst] + service_s)
                self._receiver_free[dst] = done
                if done > now:
                    self._push(done, src, dst, packet, True)
                    continue
            self._deliver(src, dst, packet)
        return None

    def _push(self, at: float, src: int, dst: int, packet: bytes, received: bool) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (at, self._sequence, src, dst, packet, received))

    def _deliver(self, src: int, dst: int, packet: bytes) -> None:
        loss = self.links[src][dst].loss
        if loss and self._chance[src][dst].random() < loss:
            self.dropped[src][dst] += 1
            return
        try:
            os.write(self.tuns[dst], packet)
        except OSError:
            self.dropped[src][dst] += 1


def answer(emulator: Emulator, request: dict[str, Any]) -> dict[str, Any]:
    """One request of the control socket."""
    nodes = range(len(emulator.tuns))
    if request["do"] == "set":
        for src in nodes if request["src"] is None else [request["src"]]:
            for dst in nodes if request["dst"] is None else [request["dst"]]:
                emulator.links[src][dst] = LinkSpec(**request["link"])
        return {}
    if request["do"] == "links":
        return {"links": [[asdict(link) for link in row] for row in emulator.links]}
    counters = {"packets": emulator.packets, "bytes": emulator.bytes, "dropped": emulator.dropped}
    if request["do"] == "reset":
        emulator.reset()
    return counters


def run(emulator: Emulator, control: socket.socket) -> None:
    """Forward until the control socket ends."""
    requests = control.makefile("rb", buffering=0)
    sources = {tun: node for node, tun in enumerate(emulator.tuns)}
    timeout: float | None = None
    while True:
        ready, _, _ = select.select([control.fileno(), *sources], [], [], timeout)
        for descriptor in ready:
            if descriptor == control.fileno():
                line = requests.readline()
                if not line:
                    return
                control.sendall(json.dumps(answer(emulator, json.loads(line))).encode() + b"\n")
            else:
                emulator.read(sources[descriptor])
        timeout = emulator.advance()


def _go_first() -> None:
    """Ahead of the processes whose network this is: a delay must not become longer because they compute."""
    try:
        # Real time also has no timer slack, which is 50 us otherwise.
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(2))
    except PermissionError:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, -20)


def main() -> None:
    """Make the namespaces, say where they are, forward, and leave nothing behind."""
    options = json.loads(sys.argv[1])
    control = socket.socket(fileno=os.dup(0))
    _go_first()
    home = "/proc/self/fd/" + str(os.open("/proc/self/ns/net", os.O_RDONLY))
    tuns, names = [], []
    for address in options["addresses"]:
        namespaces.unshare()
        names.append(os.open("/proc/self/ns/net", os.O_RDONLY))
        tuns.append(namespaces.open_tun(address))
    namespaces.enter(home)
    paths = [f"/proc/{os.getpid()}/fd/{name}" for name in names]
    try:
        control.sendall(json.dumps(paths).encode() + b"\n")
        with contextlib.suppress(ConnectionError):
            run(Emulator(tuns, LinkSpec(**options["link"]), options["seed"]), control)
    finally:
        identities = {namespaces.identity(path) for path in paths}
        if left := namespaces.kill_processes(identities, spare={os.getpid(), os.getppid()}):
            sys.exit(f"these processes did not end: {left}")


if __name__ == "__main__":
    main()
