"""Timed exchanges on live ranks: the constants of the cost model on this network."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch

from phalanx.parallel.costmodel import Sample, calibrate, fabric_of
from phalanx.parallel.topology import EpTopology
from phalanx.parallel.transport import AllGather, AllToAll, Counts, Hop, Transport, peers

SIZES = (256, 4096, 32768, 131072, 524288)
"""Bytes per message."""

MOST_BYTES = 2 << 20
"""Of all messages of a rank together; larger samples would measure for seconds."""

REPETITIONS = 3
PACK_ROWS, PACK_BYTES = 256, 4096


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

    Cost: at most 200 exchanges, less than a second on gloo.
    """
    return fabric_of(calibrate(collect(transport, torch.device("cpu") if device is None else device)))


def collect(transport: Transport, device: torch.device) -> list[Sample]:
    """The samples behind `measure`, equal on every rank: each the median over repetitions of the slowest rank."""
    cases = list(_cases(transport.topology))
    timings = [_time_exchange(transport, case, device) for case in cases]
    rows = torch.zeros(PACK_ROWS, PACK_BYTES, dtype=torch.uint8, device=device)
    order = torch.arange(PACK_ROWS - 1, -1, -1, device=device)
    timings.append([_seconds(lambda: rows.index_select(0, order), device) for _ in range(REPETITIONS)])

    mine = torch.tensor([timings], dtype=torch.float64, device=device)
    slowest = transport.start(AllGather("flat", mine)).wait().amax(0).tolist()
    medians = [statistics.median(seconds) for seconds in slowest]
    samples = [
        Sample(case.tier, case.num_messages, case.num_messages * case.size, seconds)
        for case, seconds in zip(cases, medians, strict=False)
    ]
    return [*samples, Sample("pack", 0, PACK_ROWS * PACK_BYTES, medians[-1])]


def _cases(topology: EpTopology) -> Iterator[Case]:
    """Few and many messages tell o from L; the same on every rank."""
    num_nodes, num_ranks, num_local = topology.num_nodes, topology.num_ranks, topology.max_local
    fewest: list[tuple[Literal["inter", "intra"], Hop, int]] = [
        ("inter", "rail", num_nodes - 1),
        ("inter", "flat", num_ranks - num_local),
        ("intra", "node", num_local - 1),
    ]
    by_number = {(tier, num_messages): hop for tier, hop, num_messages in reversed(fewest) if num_messages}
    for (tier, num_messages), hop in by_number.items():
        for size in sorted({min(size, MOST_BYTES // num_messages) for size in SIZES}):
            yield Case(tier, hop, num_messages, size)


def _time_exchange(transport: Transport, case: Case, device: torch.device) -> list[float]:
    topology, rank = transport.topology, transport.rank
    members = peers(topology, rank, case.hop)
    out = _targets(topology, members, rank, case)
    send = tuple(int(member in out) for member in members)
    receive = tuple(int(rank in _targets(topology, members, member, case)) for member in members)
    request = AllToAll(case.hop, torch.zeros(sum(send), case.size, dtype=torch.uint8, device=device), send, receive)
    meeting = Counts("flat", torch.zeros(topology.num_ranks, 1, dtype=torch.int32, device=device))
    timings = []
    for _ in range(REPETITIONS + 1):
        # Begin together, whatever the previous exchange was; the first time, connections and caches warm up.
        transport.start(meeting).wait()
        timings.append(_seconds(lambda: transport.start(request).wait(), device))
    return timings[1:]


def _targets(topology: EpTopology, members: tuple[int, ...], rank: int, case: Case) -> list[int]:
    """The next `num_messages` members after `rank`: on even nodes every rank sends and receives the same number."""
    here = members.index(rank)
    after = [*members[here + 1 :], *members[:here]]
    if case.tier == "inter":
        after = [member for member in after if topology.node_of[member] != topology.node_of[rank]]
    return after[: case.num_messages]


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
