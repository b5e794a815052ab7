"""The lab keeps what it promises: delay, rate, cost, loss, counters, and nothing left behind. About 6 s."""

import os
import signal
import socket
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest

from tests.netlab import namespaces, programs
from tests.netlab.emulator import LinkSpec
from tests.netlab.forward import Forward
from tests.netlab.lab import ROOT, Lab, Node, why_not
from tests.support.deployment import wait_until
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.network, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

IP_UDP_HEADERS = 28


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(3) as lab:
        yield lab


@contextmanager
def connection(client: Node, server: Node) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The two ends of a TCP connection, client's first."""
    with server.inside():
        listener = socket.create_server((server.address, 0))
    with client.inside():
        ours = socket.create_connection(listener.getsockname(), timeout=20)
    theirs, _ = listener.accept()
    with listener, ours, theirs:
        for end in (ours, theirs):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield ours, theirs


@contextmanager
def datagrams(node: Node) -> Iterator[socket.socket]:
    with node.inside():
        end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with end:
        end.bind((node.address, 0))
        end.settimeout(2)
        yield end


def receive_all(end: socket.socket, num_bytes: int) -> None:
    while num_bytes:
        got = len(end.recv(min(num_bytes, 1 << 20)))
        assert got, "the connection ended early"
        num_bytes -= got


def round_trip_s(ours: socket.socket, theirs: socket.socket, rounds: int = 20) -> float:
    """Median time of one byte there and back."""

    def echo() -> None:
        for _ in range(rounds):
            theirs.sendall(theirs.recv(1))

    thread = threading.Thread(target=echo)
    thread.start()
    seconds = []
    for _ in range(rounds):
        began = time.monotonic()
        ours.sendall(b"x")
        receive_all(ours, 1)
        seconds.append(time.monotonic() - began)
    thread.join()
    return statistics.median(seconds)


def stream_s(pairs: list[tuple[socket.socket, socket.socket]], num_bytes: int) -> float:
    """Time until every connection has carried so many bytes, all at once."""
    senders = [threading.Thread(target=ours.sendall, args=(bytes(num_bytes),)) for ours, _ in pairs]
    receivers = [threading.Thread(target=receive_all, args=(theirs, num_bytes)) for _, theirs in pairs]
    began = time.monotonic()
    for thread in senders + receivers:
        thread.start()
    for thread in senders + receivers:
        thread.join()
    return time.monotonic() - began


def burst(source: socket.socket, sink: socket.socket, count: int, size: int = 100) -> list[tuple[int, float]]:
    """Send `count` numbered datagrams back to back; returns (number, arrival) of those that came."""
    began = time.monotonic()
    for number in range(count):
        source.sendto(number.to_bytes(size, "little"), sink.getsockname())
    arrived: list[tuple[int, float]] = []
    sink.settimeout(0.3)
    try:
        while len(arrived) < count:
            arrived.append((int.from_bytes(sink.recv(size), "little"), time.monotonic() - began))
    except TimeoutError:
        pass
    return arrived


def test_delay_is_per_direction_and_can_be_changed(lab: Lab) -> None:
    with connection(lab.nodes[0], lab.nodes[1]) as ends:
        assert round_trip_s(*ends) < 4e-3
        lab.set_link(LinkSpec(delay_s=5e-3), src=0, dst=1)
        assert 5e-3 < round_trip_s(*ends) < 9e-3
        lab.set_link(LinkSpec(delay_s=10e-3), src=1)
        assert 15e-3 < round_trip_s(*ends) < 20e-3
    assert lab.link(0, 1).delay_s == 5e-3
    assert lab.link(0, 2) == LinkSpec()
    with connection(lab.nodes[0], lab.nodes[2]) as ends:
        assert round_trip_s(*ends) < 4e-3


def test_rate_is_that_of_both_network_cards(lab: Lab) -> None:
    """One stream has the rate; two from one sender, or to one receiver, share it; two disjoint ones do not."""
    rate, size = 10e6, 600_000  # below TCP's first window of ten packets: no waiting for acknowledgements
    lab.set_link(LinkSpec(delay_s=1e-3, rate=rate))
    a, b, c = lab.nodes

    def rates(*pairs: tuple[Node, Node]) -> float:
        with connection(*pairs[0]) as first, connection(*pairs[-1]) as second:
            ends = [first, second][: len(pairs)]
            return len(ends) * size / stream_s(ends, size) / rate

    assert 0.6 < rates((a, b)) < 1.02
    assert 0.6 < rates((a, b), (a, c)) < 1.02
    assert 0.6 < rates((a, c), (b, c)) < 1.02
    assert 1.2 < rates((a, b), (b, a)) < 2.04


def test_every_packet_costs_its_occupancy(lab: Lab) -> None:
    lab.set_link(LinkSpec(packet_s=2e-3))
    with datagrams(lab.nodes[0]) as source, datagrams(lab.nodes[1]) as sink:
        arrived = [at for _, at in burst(source, sink, 20)]
    assert len(arrived) == 20
    # In order, one every 2 ms, and the receiver's cost runs beside the sender's.
    assert 40e-3 < arrived[-1] < 60e-3
    assert 2e-3 < arrived[0] < 10e-3


def test_counters_are_exact(lab: Lab) -> None:
    with datagrams(lab.nodes[0]) as source, datagrams(lab.nodes[2]) as sink:
        assert len(burst(source, sink, 50, size=1000)) == 50
    counters = lab.counters(reset=True)
    assert counters.packets == [[0, 0, 50], [0, 0, 0], [0, 0, 0]]
    assert counters.bytes == [[0, 0, 50 * (1000 + IP_UDP_HEADERS)], [0, 0, 0], [0, 0, 0]]
    assert lab.counters().total_bytes == 0
    with connection(lab.nodes[1], lab.nodes[0]) as ends:
        stream_s([ends], 3_000_000)
    assert 3_000_000 < lab.counters().bytes[1][0] < 1.03 * 3_000_000


def test_what_stays_in_a_node_is_not_on_a_link(lab: Lab) -> None:
    with connection(lab.nodes[0], lab.nodes[0]) as ends:
        stream_s([ends], 1_000_000)
    assert lab.counters().total_bytes == 0


def test_losses_repeat_with_the_seed() -> None:
    def survivors(seed: int) -> list[int]:
        with Lab(2, link=LinkSpec(loss=0.3), seed=seed) as lab:
            with datagrams(lab.nodes[0]) as source, datagrams(lab.nodes[1]) as sink:
                numbers = [number for number, _ in burst(source, sink, 150)]
            assert lab.counters().dropped[0][1] == 150 - len(numbers)
        return numbers

    first = survivors(1)
    assert 0.55 * 150 < len(first) < 0.85 * 150  # five standard deviations around 0.7
    assert survivors(1) == first
    assert survivors(2) != first


def test_a_cut_link_carries_nothing_until_it_is_mended(lab: Lab) -> None:
    whole = lab.link(0, 1)
    with datagrams(lab.nodes[0]) as source, datagrams(lab.nodes[1]) as sink:
        lab.set_link(replace(whole, loss=1.0), src=0, dst=1)
        assert burst(source, sink, 10) == []
        lab.set_link(whole, src=0, dst=1)
        assert len(burst(source, sink, 10)) == 10


def test_tcp_survives_losses(lab: Lab) -> None:
    lab.set_link(LinkSpec(loss=0.02))
    with connection(lab.nodes[0], lab.nodes[1]) as ends:
        stream_s([ends], 2_000_000)


def test_gloo_across_two_nodes(lab: Lab) -> None:
    """2 nodes x 2 ranks: payload right, the time that of the link, node bytes that of the payload within 3 %."""
    rows, rounds, rate = 16384, 5, 50e6
    lab.set_link(LinkSpec(delay_s=1e-3, rate=rate))
    results = run_ranks(4, programs.exchange, lab.nodes[:2], 2, rows, rounds)
    assert all(right for right, _ in results)
    payload = rounds * 2 * 2 * rows * 8
    counters = lab.counters()
    for src, dst in ((0, 1), (1, 0)):
        assert payload < counters.bytes[src][dst] < 1.03 * payload
    wire_s = payload / rounds / rate
    # A rank that left the barrier late has waited less than the wire took.
    assert 0.7 * wire_s < max(seconds for _, seconds in results) < 4 * wire_s


def test_a_port_is_forwarded(lab: Lab) -> None:
    with lab.nodes[1].inside():
        listener = socket.create_server(("127.0.0.1", 0))
    with listener, Forward(lab.nodes[1], f"127.0.0.1:{listener.getsockname()[1]}") as forward:
        host, _, port = forward.address.rpartition(":")
        for size in (1, 300_000):
            with socket.create_connection((host, int(port)), timeout=10) as ours:
                theirs, _ = listener.accept()
                with theirs:
                    stream_s([(ours, theirs), (theirs, ours)], size)
                    ours.shutdown(socket.SHUT_WR)
                    assert theirs.recv(1) == b""


DETACHED = "import os, time; os.fork() or os.setsid(); time.sleep(600)"


def gone(lab: Lab, identities: set[int]) -> Callable[[], bool]:
    """No process in the namespaces, and no descriptor of this process keeps one alive."""

    def check() -> bool:
        names = {f"net:[{identity}]" for identity in identities}
        held = [link for link in map(_link, os.listdir("/proc/self/fd")) if link in names]
        return not held and not namespaces.processes(identities)

    return check


def _has(count: int, identities: set[int]) -> bool:
    return len(namespaces.processes(identities)) == count


def _link(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return ""


def test_nothing_is_left_whatever_happened() -> None:
    for error in (None, RuntimeError, KeyboardInterrupt):
        home = namespaces.identity("/proc/thread-self/ns/net")
        try:
            with Lab(2) as lab:
                identities = {namespaces.identity(node.namespace) for node in lab.nodes}
                for node in range(2):
                    lab.popen(node, [sys.executable, "-c", DETACHED])
                wait_until(partial(_has, 4, identities), 10, "four processes")
                if error is not None:
                    raise error
        except (RuntimeError, KeyboardInterrupt):
            pass
        assert gone(lab, identities)()
        assert namespaces.identity("/proc/thread-self/ns/net") == home


def test_a_node_can_lose_power(lab: Lab) -> None:
    victim, other = (lab.popen(node, [sys.executable, "-c", DETACHED]) for node in (0, 1))
    lab.kill(0)
    assert victim.wait(5) == -signal.SIGKILL
    assert other.poll() is None
    with connection(lab.nodes[0], lab.nodes[1]) as ends:
        assert round_trip_s(*ends, rounds=3) < 5e-3


def test_a_killed_owner_takes_all_along() -> None:
    program = f"""
        import sys, time
        from tests.netlab.lab import Lab
        from tests.netlab import namespaces
        with Lab(2) as lab:
            lab.popen(1, [sys.executable, "-c", {DETACHED!r}])
            while len(namespaces.processes({{namespaces.identity(lab.nodes[1].namespace)}})) < 2: time.sleep(0.01)
            print(namespaces.identity(lab.nodes[1].namespace), lab.nodes[1].namespace.split("/")[2], flush=True)
            time.sleep(600)
    """
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert owner.stdout is not None
    identity, emulator = map(int, owner.stdout.readline().split())
    owner.kill()
    owner.wait()
    owner.stdout.close()
    wait_until(lambda: not namespaces.processes({identity}), 5, "the processes end")
    wait_until(lambda: not _alive(emulator), 5, "the emulator ends")


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_rights_the_reason_is_told() -> None:
    program = "import os, tests.netlab.lab as lab; os.setgroups([]); os.setuid(65534); print(lab.why_not())"
    output = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "run as root" in output.stdout


def test_a_dead_emulator_is_named(lab: Lab) -> None:
    os.kill(int(lab.nodes[0].namespace.split("/")[2]), signal.SIGKILL)
    with pytest.raises(OSError, match="the link emulator ended"):
        lab.counters()
