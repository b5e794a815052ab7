"""What ranks do in the tests of expert-parallel exchanges; imported by rank processes, so cheap to import."""

import os
import signal
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from phalanx.errors import ReplicaLostError
from phalanx.moe.probe import Probe
from phalanx.parallel import calibration
from phalanx.parallel.costmodel import ExpertTraffic
from phalanx.parallel.membership import Membership, Transfer, build
from phalanx.parallel.topology import EpTopology
from phalanx.parallel.traffic import CountingTransport, Traffic
from phalanx.parallel.transport import AllGather, AllToAll, Counts, Exchange, Hop, ReduceScatter, peers, run

HOPS: tuple[Hop, ...] = ("flat", "rail", "node")
DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int32)
CPU = torch.device("cpu")


def connect(address: str) -> dist.Store:
    host, _, port = address.rpartition(":")
    return dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=20), use_libuv=True)


def meet(
    store: dist.Store, generation: int, topology: EpTopology, rank: int, timeout_s: float = 20.0, prefix: str = "ep/1"
) -> Membership:
    return build(
        store,
        prefix=prefix,
        generation=generation,
        topology=topology,
        rank=rank,
        device=CPU,
        timeout_s=timeout_s,
        interface="lo",
    )


def rows_between(source: int, target: int, hop: Hop) -> int:
    """Ragged; every third rank has nothing to send, and nobody sends to every fifth."""
    return 0 if source % 3 == 1 or target % 5 == 4 else (3 * source + 5 * target + len(hop)) % 4


def payload(source: int, target: int, hop: Hop, dtype: torch.dtype) -> Tensor:
    """Rows that a receiver can check alone."""
    start = 7 * source + 3 * target
    return (torch.arange(rows_between(source, target, hop) * 5) % 11 + start).to(dtype).view(-1, 5)


def all_requests(topology: EpTopology, rank: int) -> Exchange[list[Tensor]]:
    """Every request on every hop; the results as float32."""
    results = []
    for hop in HOPS:
        members = peers(topology, rank, hop)
        for dtype in DTYPES:
            rows = torch.cat([payload(rank, peer, hop, dtype) for peer in members])
            send = tuple(rows_between(rank, peer, hop) for peer in members)
            receive = tuple(rows_between(peer, rank, hop) for peer in members)
            results.append((yield AllToAll(hop, rows, send, receive)))
        nothing = (0,) * len(members)
        results.append((yield AllToAll(hop, torch.empty(0, 16, dtype=torch.uint8), nothing, nothing)))
        counts = torch.tensor([[rank, peer, len(hop)] for peer in members], dtype=torch.int32)
        results.append((yield Counts(hop, counts)))
        for num_rows in (2, 0):
            results.append((yield AllGather(hop, torch.full((num_rows, 3), rank, dtype=torch.bfloat16))))
            for dtype in (torch.float32, torch.bfloat16):
                parts = torch.tensor(members).repeat_interleave(num_rows).view(-1, 1).expand(-1, 3)
                results.append((yield ReduceScatter(hop, (parts + rank).to(dtype))))
    return [result.float() for result in results]


def exchange_everything(rank: int, address: str, topologies: list[EpTopology]) -> list[list[Tensor]]:
    """`all_requests` on one generation per topology; afterwards the bytes that each rank counted."""
    store = connect(address)
    results = []
    for generation, topology in enumerate(topologies):
        if rank >= topology.num_ranks:
            continue
        membership = meet(store, generation, topology, rank)
        counting = CountingTransport(membership.transport, Traffic(topology))
        results.append(run(all_requests(topology, rank), counting))
        pairs = counting.traffic.pairs()
        results.append([torch.from_numpy(values) for values in pairs])
        membership.destroy()
    assert not dist.is_initialized()
    return results


def cycle(rank: int, address: str, cycles: int) -> list[tuple[int, int]]:
    """(descriptors, threads) after each build, exchange, move and destroy."""
    store = connect(address)
    topology = EpTopology.uniform(2, 1)
    census = []
    for generation in range(cycles):
        membership = meet(store, generation, topology, rank)
        run(all_requests(topology, rank), membership.transport)
        swap(membership)
        membership.destroy()
        del membership
        census.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    return census


def swap(membership: Membership) -> Tensor:
    """Rows to and from each other rank, received in another order than they were sent."""
    others = [rank for rank in range(membership.topology.num_ranks) if rank != membership.rank]
    sending = membership.mover.begin(
        [
            Transfer(torch.full((1000,), 10 * membership.rank + tag, dtype=torch.uint8), other, tag, is_send=True)
            for other in others
            for tag in (1, 2)
        ]
    )
    receiving = membership.mover.begin(
        [
            Transfer(torch.empty(1000, dtype=torch.uint8), other, tag, is_send=False)
            for tag in (2, 1)
            for other in reversed(others)
        ]
    )
    for handle in sending:
        handle.wait()
    deadline = time.monotonic() + 10
    while not all(handle.is_done() for handle in receiving):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return torch.stack([handle.wait() for handle in receiving])


def late_row(rank: int, address: str) -> list[bool]:
    """Whether rank 1 sees a row of rank 0 before it is sent, and afterwards; one that is never sent stays unseen."""
    membership = meet(connect(address), 1, EpTopology.uniform(1, 2), rank)
    if rank == 1:
        rows = [torch.zeros(1 << 16, dtype=torch.uint8) for _ in range(2)]
        coming, never = membership.mover.begin([Transfer(row, 0, tag, is_send=False) for tag, row in enumerate(rows)])
        time.sleep(0.1)
        seen = [coming.is_done()]
        agree(membership, 0)
        deadline = time.monotonic() + 10
        while not coming.is_done() and time.monotonic() < deadline:
            time.sleep(0.001)
        seen += [coming.is_done(), bool((coming.wait() == 7).all()), never.is_done()]
    else:
        agree(membership, 0)
        row = torch.full((1 << 16,), 7, dtype=torch.uint8)
        (sending,) = membership.mover.begin([Transfer(row, 1, 0, is_send=True)])
        seen = [sending.is_done()]
        sending.wait()
    agree(membership, 1)
    membership.destroy()
    return seen


def move_rows(rank: int, address: str, size: int) -> list[int]:
    membership = meet(connect(address), 1, EpTopology.uniform(1, size), rank)
    rows = swap(membership)
    membership.destroy()
    assert (rows == rows[:, :1]).all()
    return rows[:, 0].tolist()


def agree(membership: Membership, value: int) -> list[int]:
    """The values there are, over rail and then node: ranks on neither never talk to each other directly."""

    def exchange() -> Exchange[Tensor]:
        rail = yield AllGather("rail", torch.tensor([[value]], dtype=torch.int32))
        return (yield AllGather("node", rail))

    return sorted(set(run(exchange(), membership.transport).flatten().tolist()))


def grow_while_serving(rank: int, address: str, late_s: float) -> list[int]:
    """Ranks 0-2 serve generation 1 while 0-3 build generation 2, to which rank 3 comes late. Rounds served then."""
    store = connect(address)
    larger = EpTopology.uniform(2, 2)
    if rank == 3:
        time.sleep(late_s)
        membership = meet(store, 2, larger, rank)
        values = agree(membership, rank)
        assert agree(membership, rank) == values
        membership.destroy()
        return [0, *values]
    serving = meet(store, 1, EpTopology.uniform(3, 1), rank)
    built: list[Membership] = []
    builder = threading.Thread(target=lambda: built.append(meet(store, 2, larger, rank)))
    builder.start()
    rounds = 0
    while min(agree(serving, len(built))) == 0:
        rounds += 1
        time.sleep(0.002)
    builder.join()
    values = agree(built[0], rank)
    serving.destroy()
    assert agree(built[0], rank) == values
    built[0].destroy()
    return [rounds, *values]


def miss_one(rank: int, address: str) -> list[object]:
    """Rank 2 of generation 2 never comes; generation 1 goes on, and generation 3 is built without it."""
    store = connect(address)
    serving = meet(store, 1, EpTopology.uniform(1, 2), rank)
    begin = time.monotonic()
    try:
        meet(store, 2, EpTopology.uniform(1, 3), rank, timeout_s=0.5)
    except ReplicaLostError as error:
        message, took_s = str(error), time.monotonic() - begin
    values = agree(serving, rank)
    following = meet(store, 3, EpTopology.uniform(1, 2), 1 - rank)
    assert agree(following, rank) == values
    serving.destroy()
    following.destroy()
    return [message, took_s, values]


def victim(address: str, topology: EpTopology, rank: int, rounds: int) -> None:
    """Dies in the middle of serving, without a word."""
    torch.set_num_threads(1)
    store = connect(address)
    membership = meet(store, 1, topology, rank)
    for value in range(rounds):
        agree(membership, value)
    store.set("died", str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


def survive(rank: int, address: str, topology: EpTopology, smaller: EpTopology) -> list[object]:
    """Serve until a member dies; then serve without it. Seconds until noticed, and until serving again."""
    store = connect(address)
    membership = meet(store, 1, topology, rank)
    try:
        while True:
            agree(membership, 0)
    except ReplicaLostError as error:
        noticed, message = time.monotonic(), str(error)
    membership.destroy()
    membership = meet(store, 2, smaller, rank)
    values = agree(membership, rank)
    again = time.monotonic()
    membership.destroy()
    died = float(store.get("died"))
    return [noticed - died, again - died, values, message]


def refusals(rank: int, address: str) -> list[str]:
    """Messages of builds that cannot be."""
    store = connect(address)
    two = EpTopology.uniform(1, 2)
    meet(store, 1, two, rank).destroy()
    messages = []
    for attempt in (
        lambda: meet(store, 1, two, rank),
        lambda: meet(store, 5, two, 2),
        lambda: build(
            store, prefix="x", generation=1, topology=two, rank=rank, device=CPU, timeout_s=1, interface="no0"
        ),
    ):
        try:
            attempt()
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    membership = meet(store, 6, two, rank)
    membership.destroy()
    membership.destroy()
    try:
        agree(membership, 0)
    except ReplicaLostError as error:
        messages.append(f"{type(error).__name__}: {error}")
    return messages


def calibrate_live(rank: int, address: str, topology: EpTopology) -> list[object]:
    """Measured constants, and how long that took."""
    membership = meet(connect(address), 1, topology, rank)
    begin = time.monotonic()
    traffic = ExpertTraffic.of(256, 4, 16, 4, exact=False)
    fabric = calibration.measure(membership.transport, traffic, Probe(traffic, 256, torch.float32, CPU).layer)
    took_s = time.monotonic() - begin
    membership.destroy()
    return [fabric, took_s]


def abandon(rank: int, address: str) -> int:
    """Destroy with rows on their way that nobody takes; the next generation must not notice."""
    store = connect(address)
    topology = EpTopology.uniform(1, 2)
    membership = meet(store, 1, topology, rank)
    membership.mover.begin([Transfer(torch.zeros(1 << 22, dtype=torch.uint8), 1 - rank, 1, is_send=True)])
    membership.mover.begin([Transfer(torch.zeros(1000, dtype=torch.uint8), 1 - rank, 2, is_send=False)])
    membership.destroy()
    following = meet(store, 2, topology, rank)
    moved = int(swap(following).sum())
    following.destroy()
    return moved
