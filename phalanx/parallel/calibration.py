"""Timed exchanges on live ranks: the constants of the cost model on this network."""

import statistics
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from phalanx.parallel.costmodel import Sample, calibrate, fabric_of
from phalanx.parallel.topology import EpTopology
from phalanx.parallel.transport import AllGather, AllToAll, Hop, Transport, peers

SIZES = (256, 4096, 32768, 131072, 524288)
"""Bytes per message."""

MOST_BYTES = 2 << 20
"""Of all messages of a rank together."""

LONG_S = 0.04
"""Exchanges that take so long are timed one at a time, and larger ones not at all: bytes are what counts by then."""

CHAIN = 3
"""Exchanges timed together, as those of a layer follow each other: what one leaves behind is in the next one's way."""

REPETITIONS = 3
REST_S = 0.02
"""At most, before a chain begins: acknowledgements of the meeting still occupy a slow link."""

PACK_OPERATIONS = 16
"""Operations on masks and indices that stand for finding out which rows go where."""

PACK_ROWS, PACK_BYTES = (1, 32, 1024), 2048


class Case(NamedTuple):
    """Each rank sends `size` bytes to `num_messages` peers of a hop; in a smaller node to as many as there are."""

    tier: Literal["inter", "intra"]
    hop: Hop
    num_messages: int
    size: int


def measure(transport: Transport, device: torch.device | None = None) -> list[float]:
    """Time exchanges of five sizes between nodes and inside them; all ranks of the group call it together.

    Args:
        transport: of the expert group, which does nothing else meanwhile.
        device: of the rows; None = CPU.

    Returns:
        The fields of a `LogGP`, equal on every rank: `costs_from` takes them.

    Raises:
        ConfigError: the group has one rank.
        ReplicaLostError: a rank is gone.

    Cost: about 200 exchanges; 0.1 s inside a host, 3 s between nodes at 200 Mbit/s.
    """
    return fabric_of(calibrate(collect(transport, torch.device("cpu") if device is None else device)))


def collect(transport: Transport, device: torch.device) -> list[Sample]:
    """The samples behind `measure`, equal on every rank: each the median over repetitions of the slowest rank."""
    clock = _Clock(transport, device)
    samples = []
    for cases in _cases(transport.topology):
        for case in cases:
            seconds = _time_exchange(clock, case)
            samples.append(Sample(case.tier, case.num_messages, case.num_messages * case.size, seconds))
            if seconds > LONG_S:
                break
    return [*samples, *(Sample("pack", 1, rows * PACK_BYTES, _time_packing(clock, rows)) for rows in PACK_ROWS)]


class _Clock:
    """Times what all ranks do at once; its answers are the same on every rank."""

    def __init__(self, transport: Transport, device: torch.device) -> None:
        self.transport, self.device = transport, device
        self._last = 0.0

    def median(self, action: Callable[[], object]) -> float:
        """Seconds of the slowest rank, the median over repetitions."""
        return statistics.median(self.slowest(action) for _ in range(REPETITIONS))

    def slowest(self, action: Callable[[], object]) -> float:
        """Seconds of the slowest rank."""
        time.sleep(min(REST_S, 5 * self._last))
        self._synchronize()
        begin = time.perf_counter()
        action()
        self._synchronize()
        mine = torch.tensor([[time.perf_counter() - begin]], dtype=torch.float64, device=self.device)
        # This is also where all meet before the next begins.
        self._last = float(self.transport.start(AllGather("flat", mine)).wait().max())
        return self._last

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _cases(topology: EpTopology) -> list[list[Case]]:
    """By rising size; the same on every rank. gloo sends empty messages, too: all peers of a hop get one."""
    num_nodes, num_ranks, num_local = topology.num_nodes, topology.num_ranks, topology.max_local
    hops: list[tuple[Literal["inter", "intra"], Hop, int]] = [
        ("inter", "flat", num_ranks - num_local),
        ("inter", "rail", num_nodes - 1),
        ("intra", "node", num_local - 1),
    ]
    # On nodes of one rank the rail is the whole group.
    by_number = {(tier, num_messages): hop for tier, hop, num_messages in hops if num_messages}
    return [
        [Case(tier, hop, num, size) for size in sorted({min(size, MOST_BYTES // num) for size in SIZES})]
        for (tier, num), hop in by_number.items()
    ]


def _time_exchange(clock: _Clock, case: Case) -> float:
    transport, topology, rank = clock.transport, clock.transport.topology, clock.transport.rank
    members = peers(topology, rank, case.hop)
    out = _targets(topology, members, rank, case)
    send = tuple(int(member in out) for member in members)
    receive = tuple(int(rank in _targets(topology, members, member, case)) for member in members)
    # Not zeros: memory that nobody has written is one page of the kernel, always in the cache.
    rows = torch.ones(sum(send), case.size, dtype=torch.uint8, device=clock.device)
    request = AllToAll(case.hop, rows, send, receive)

    def chain(length: int) -> None:
        for _ in range(length):
            transport.start(request).wait()

    length = CHAIN if clock.slowest(lambda: chain(1)) < LONG_S / CHAIN else 1
    return clock.median(lambda: chain(length)) / length


def _time_packing(clock: _Clock, num_rows: int) -> float:
    rows = torch.ones(num_rows, PACK_BYTES, dtype=torch.uint8, device=clock.device)
    order = torch.arange(num_rows - 1, -1, -1, device=clock.device)

    def pack() -> None:
        for _ in range(PACK_OPERATIONS):
            order[:1].cumsum(0)
        rows.index_select(0, order)

    clock.slowest(pack)
    return clock.median(pack)


def _targets(topology: EpTopology, members: tuple[int, ...], rank: int, case: Case) -> list[int]:
    """The next `num_messages` members after `rank`: on even nodes every rank sends and receives the same number."""
    here = members.index(rank)
    after = [*members[here + 1 :], *members[:here]]
    if case.tier == "inter":
        after = [member for member in after if topology.node_of[member] != topology.node_of[rank]]
    return after[: case.num_messages]
