"""Timed exchanges on live ranks: the constants of the cost model on this network."""

import statistics
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from phalanx.parallel.cost_fit import LayerSample, Sample, calibrate, curves_of
from phalanx.parallel.costmodel import KINDS, ExpertTraffic, Kind, fabric_of
from phalanx.parallel.topology import EpTopology
from phalanx.parallel.transport import AllGather, AllToAll, Hop, Transport, peers

SIZES = (256, 8192, 65536, 524288)
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
LAYER_TOKENS = (1, 8, 48, 144, 384)
"""Per rank, of whole layers; none after one that takes `LAST_LAYER_S`."""

LAST_LAYER_S = 0.25

MakeLayer = Callable[[Transport, Kind, int], Callable[[], object]]
"""(transport, kind, tokens per rank) -> a layer's exchanges with evenly routed tokens: `phalanx.moe.probe`."""


class Case(NamedTuple):
    """Each rank sends `size` bytes to `num_messages` peers of a hop; in a smaller node to as many as there are."""

    tier: Literal["inter", "intra"]
    hop: Hop
    num_messages: int
    size: int


def measure(
    transport: Transport, traffic: ExpertTraffic, layer: MakeLayer, device: torch.device | None = None
) -> list[float]:
    """Time exchanges between nodes and inside them, then whole layers; all ranks of the group call it together.

    Args:
        transport: of the expert group, which does nothing else meanwhile.
        traffic: of the layers that will be predicted.
        layer: makes one that carries out its exchanges when called.
        device: of the rows; None = CPU.

    Returns:
        Constants and curves as a list, equal on every rank: `costs_from` takes it.

    Raises:
        ConfigError: the group has one rank.
        ReplicaLostError: a rank is gone.

    Cost: about 600 exchanges; 1 s for two ranks inside a host, 7 s between two nodes of four at 200 Mbit/s.
    """
    clock = _Clock(transport, torch.device("cpu") if device is None else device)
    constants = calibrate(time_exchanges(clock))
    return fabric_of(constants, curves_of(constants, time_layers(clock, traffic, layer)))


def time_exchanges(clock: "_Clock") -> list[Sample]:
    """Exchanges one by one, equal on every rank."""
    samples = []
    for cases in _cases(clock.transport.topology):
        for case in cases:
            seconds = _time_exchange(clock, case)
            samples.append(Sample(case.tier, case.num_messages, case.num_messages * case.size, seconds))
            if seconds > LONG_S:
                break
    return [*samples, *(Sample("pack", 1, rows * PACK_BYTES, _time_packing(clock, rows)) for rows in PACK_ROWS)]


def time_layers(clock: "_Clock", traffic: ExpertTraffic, layer: MakeLayer) -> list[LayerSample]:
    """The exchanges of a layer of each kind, evenly routed, equal on every rank."""
    transport = clock.transport
    for kind in KINDS:  # the first one of a kind loads its code and fills caches
        layer(transport, kind, LAYER_TOKENS[0])()
    samples = []
    for num_tokens in LAYER_TOKENS:
        for kind in KINDS:
            run = layer(transport, kind, num_tokens)
            clock.seconds(_nothing)  # until everybody has made it
            first = clock.seconds(run)
            timings = [clock.seconds(run) for _ in range(REPETITIONS if first < LONG_S else 1)]
            seconds = statistics.median(timings if first < LONG_S else [first, *timings])
            samples.append(LayerSample(kind, transport.topology, num_tokens, traffic, seconds))
        if samples[-1].seconds > LAST_LAYER_S:
            break
    return samples


class _Clock:
    """Times what all ranks do at once; its answers are the same on every rank."""

    def __init__(self, transport: Transport, device: torch.device) -> None:
        self.transport, self.device = transport, device
        self._last = 0.0

    def median(self, action: Callable[[], object]) -> float:
        """Seconds of one in a chain, the median over repetitions; the first time, connections and caches warm up."""
        length = CHAIN if self.seconds(action) < LONG_S / CHAIN else 1
        return statistics.median(self.seconds(action, length) for _ in range(REPETITIONS)) / length

    def seconds(self, action: Callable[[], object], times: int = 1) -> float:
        """Of the slowest rank."""
        time.sleep(min(REST_S, 2 * self._last))
        self._synchronize()
        begin = time.perf_counter()
        for _ in range(times):
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

    return clock.median(lambda: transport.start(request).wait())


def _time_packing(clock: _Clock, num_rows: int) -> float:
    rows = torch.ones(num_rows, PACK_BYTES, dtype=torch.uint8, device=clock.device)
    order = torch.arange(num_rows - 1, -1, -1, device=clock.device)

    def pack() -> None:
        for _ in range(PACK_OPERATIONS):
            order[:1].cumsum(0)
        rows.index_select(0, order)

    return clock.median(pack)


def _nothing() -> None:
    return


def _targets(topology: EpTopology, members: tuple[int, ...], rank: int, case: Case) -> list[int]:
    """The next `num_messages` members after `rank`: on even nodes every rank sends and receives the same number."""
    here = members.index(rank)
    after = [*members[here + 1 :], *members[:here]]
    if case.tier == "inter":
        after = [member for member in after if topology.node_of[member] != topology.node_of[rank]]
    return after[: case.num_messages]
