"""All ranks of an expert group in one process: their exchanges in lockstep, without processes or a network."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from phalanx.parallel.topology import EpTopology
from phalanx.parallel.traffic import Traffic
from phalanx.parallel.transport import AllGather, AllToAll, Counts, Exchange, ReduceScatter, Request, peers

Result = TypeVar("Result")


def simulate(
    topology: EpTopology, exchanges: Sequence[Exchange[Result]], *, record: Traffic | None = None
) -> list[Result]:
    """Drive one generator per rank to its end; the inverse view of `run`, which drives one generator over many ranks.

    Args:
        topology: of the expert group.
        exchanges: one per rank, in rank order.
        record: counts every payload of every rank.

    Returns:
        What the generators returned, in rank order.

    Raises:
        AssertionError: peers do not make the same request with matching row counts; names both ranks.

    Cost: per exchange one concatenation and one gather per group of peers; 2,048 ranks are practical.
    """
    assert len(exchanges) == topology.num_ranks, f"{len(exchanges)} exchanges for {topology.num_ranks} ranks"
    returned: dict[int, Result] = {}
    received: dict[int, Tensor] | None = None
    waiting = list(range(topology.num_ranks))
    while True:
        requests: dict[int, Request] = {}
        for rank in waiting:
            try:
                requests[rank] = next(exchanges[rank]) if received is None else exchanges[rank].send(received[rank])
            except StopIteration as stop:
                returned[rank] = stop.value
        if not requests:
            return [returned[rank] for rank in range(topology.num_ranks)]
        if record is not None:
            for rank, request in requests.items():
                record.sent(rank, request)
        received = _carry_out(topology, requests)
        waiting = list(requests)


def _carry_out(topology: EpTopology, requests: dict[int, Request]) -> dict[int, Tensor]:
    """One request of every rank; result per rank."""
    results: dict[int, Tensor] = {}
    for rank, request in requests.items():
        if rank not in results:
            members = peers(topology, rank, request.hop)
            group = [_same(rank, request, peer, requests.get(peer)) for peer in members]
            results.update(zip(members, _exchange(members, group), strict=True))
    return results


def _same(rank: int, request: Request, peer: int, other: Request | None) -> Request:
    assert other is not None, f"rank {peer} has ended while rank {rank} asks for {_text(request)}"
    same = type(other) is type(request) and other.hop == request.hop
    same = same and other.rows.dtype == request.rows.dtype and other.rows.shape[1:] == request.rows.shape[1:]
    same = same and (isinstance(request, AllToAll) or len(other.rows) == len(request.rows))
    assert same, f"rank {rank} asks for {_text(request)}, rank {peer} for {_text(other)}"
    return other


def _text(request: Request) -> str:
    return f"{type(request).__name__}({request.hop!r}, {request.rows.dtype} {tuple(request.rows.shape)})"


def _exchange(members: tuple[int, ...], group: list[Request]) -> Sequence[Tensor]:
    rows = [request.rows for request in group]
    match group[0]:
        case AllToAll():
            return _all_to_all(members, [request for request in group if isinstance(request, AllToAll)])
        case Counts():
            assert rows[0].dtype == torch.int32, f"rank {members[0]} counts in {rows[0].dtype}, not in int32"
            for member, row in zip(members, rows, strict=True):
                assert len(row) == len(members), f"rank {member} has {len(row)} counts for {len(members)} peers"
            return list(torch.stack(rows).transpose(0, 1).contiguous())
        case AllGather():
            gathered = torch.cat(rows)
            return [gathered.clone() for _ in members]
        case ReduceScatter():
            size, rest = divmod(len(rows[0]), len(members))
            assert not rest, f"rank {members[0]} scatters {len(rows[0])} rows over {len(members)} ranks"
            return [
                part.clone()
                for part in torch.stack(rows).sum(0, dtype=rows[0].dtype).unflatten(0, (len(members), size))
            ]


def _all_to_all(members: tuple[int, ...], group: list[AllToAll]) -> Sequence[Tensor]:
    size = len(members)
    for member, request in zip(members, group, strict=True):
        widths = (len(request.send), len(request.receive))
        assert widths == (size, size), f"rank {member} has {widths} splits for {size} peers"
        assert sum(request.send) == len(request.rows), f"rank {member} splits {len(request.rows)} rows {request.send}"
    send = np.array([request.send for request in group])
    receive = np.array([request.receive for request in group])
    for source, target in np.argwhere(send != receive.T):
        raise AssertionError(
            f"rank {members[source]} sends {send[source, target]} rows to rank {members[target]}, "
            f"which expects {receive[target, source]}"
        )
    # From blocks ordered (source, target) to blocks ordered (target, source): where each row of the result lies now.
    sizes = send.T.ravel()
    now_at = (np.cumsum(send) - send.ravel()).reshape(size, size).T.ravel()
    goes_to = np.cumsum(sizes) - sizes
    index = np.repeat(now_at - goes_to, sizes) + np.arange(sizes.sum())
    everything = torch.cat([request.rows for request in group]).index_select(0, torch.from_numpy(index))
    return list(torch.split(everything, receive.sum(1).tolist()))
