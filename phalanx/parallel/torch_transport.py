"""Exchanges of an expert group over torch.distributed: gloo between CPU ranks, NCCL between GPUs.

Between CPU ranks every request is one all-to-all, which posts all its messages at once. gloo's own all-gather and
reduce-scatter pass rows on from rank to rank, wait for each other, and send half as much again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from phalanx.errors import ReplicaLostError
from phalanx.parallel.topology import EpTopology
from phalanx.parallel.transport import AllGather, AllToAll, Hop, Pending, ReduceScatter, Request, empty_rows, peers

# torch 2.13 renames these two and warns on every rank; 2.11 knows the old names alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TorchTransport:
    """Carries out requests of one rank over process groups, which need no default group beside them.

    With one peer, the rank itself, an exchange is free: the result is the rows themselves, and no group is needed.

    Args:
        topology: of the expert group.
        rank: of this rank in the expert group.
        groups: per hop with more than one peer, the group whose ranks are `peers(topology, rank, hop)` in order.
    """

    def __init__(self, topology: EpTopology, rank: int, groups: Mapping[Hop, dist.ProcessGroup]) -> None:
        hops: tuple[Hop, ...] = ("flat", "rail", "node")
        self._peers = {hop: peers(topology, rank, hop) for hop in hops}
        self._topology = topology
        self._rank = rank
        self._groups = dict(groups)

    @property
    def rank(self) -> int:
        """Of this rank in the expert group."""
        return self._rank

    @property
    def topology(self) -> EpTopology:
        """Of the expert group."""
        return self._topology

    def start(self, request: Request) -> Pending:
        """Begin an exchange; all peers of the hop must make the same request.

        Raises:
            ReplicaLostError: here or in `wait`: a peer is gone, or did not answer within the group's timeout. Close the
                groups then (`Membership.destroy`): ranks that wait for this one learn of the loss by it.
        """
        num_peers = len(self._peers[request.hop])
        rows = request.rows.contiguous()
        if isinstance(request, AllToAll):
            assert len(request.send) == len(request.receive) == num_peers, f"splits for {num_peers} peers: {request}"
            assert sum(request.send) == len(rows), f"{len(rows)} rows, split {request.send}"
        elif not isinstance(request, AllGather):
            assert len(rows) % num_peers == 0, f"{len(rows)} rows for {num_peers} peers"
        if num_peers == 1:
            return _Here(rows)
        group = self._groups.get(request.hop)
        if group is None:
            raise ReplicaLostError(f"rank {self._rank} has no group for hop {request.hop!r}: it was destroyed")
        return _start(request, rows, group, num_peers, f"rank {self._rank}, hop {request.hop!r}")

    def close(self) -> None:
        """Let go of the groups; later requests to peers raise `ReplicaLostError`."""
        self._groups.clear()


def _start(request: Request, rows: Tensor, group: dist.ProcessGroup, num_peers: int, where: str) -> Pending:
    """Begin the collective of a request on a group of at least two."""
    if isinstance(request, AllGather | ReduceScatter) and not len(rows):
        return _Here(rows)  # everybody has as many rows: without any there is nothing to meet for
    try:
        match request:
            case AllToAll(send=send, receive=receive):
                result = empty_rows(rows, sum(receive))
                work = dist.all_to_all_single(result, rows, list(receive), list(send), group=group, async_op=True)
            case AllGather() if rows.is_cuda:
                result = empty_rows(rows, len(rows) * num_peers)
                work = _all_gather(result, rows, group=group, async_op=True)
            case ReduceScatter() if rows.is_cuda:
                result = empty_rows(rows, len(rows) // num_peers)
                work = _reduce_scatter(result, rows, group=group, async_op=True)
            case _:
                if isinstance(request, AllGather):
                    rows = rows.repeat(num_peers, *[1] * (rows.dim() - 1))
                result = torch.empty_like(rows)
                work = dist.all_to_all_single(result, rows, group=group, async_op=True)
    except RuntimeError as error:  # the base of all errors of torch.distributed
        raise ReplicaLostError(f"{where}: the exchange could not begin: {error}") from error
    sending = Sending(work.wait, where, result)
    return _Summed(sending, num_peers) if isinstance(request, ReduceScatter) and not rows.is_cuda else sending


@dataclass(frozen=True, slots=True)
class _Here:
    """A result that needed no other rank."""

    result: Tensor

    def wait(self) -> Tensor:
        return self.result


class Sending:
    """Something under way between ranks.

    Attributes:
        where: begins the message if it fails.
        result: what it fills, or what it sends.
    """

    __slots__ = ("_wait", "result", "where")

    def __init__(self, wait: Callable[[], object], where: str, result: Tensor) -> None:
        self._wait: Callable[[], object] | None = wait
        self.where = where
        self.result = result

    def wait(self) -> Tensor:
        """The result; on CUDA the current stream waits, not the host. May be called again.

        Raises:
            ReplicaLostError: a peer is gone or late.
        """
        if self._wait is not None:
            try:
                self._wait()
            except RuntimeError as error:
                # gloo keeps its sockets open as long as somebody holds the work, a traceback through here included.
                self._wait = None
                raise ReplicaLostError(f"{self.where}: a peer is gone or late: {error}") from error
            self._wait = None
        return self.result


@dataclass(frozen=True, slots=True)
class _Summed:
    """A reduce-scatter whose parts come unreduced; they are added in the order of the peers."""

    parts: Sending
    num_peers: int

    def wait(self) -> Tensor:
        parts: Tensor = self.parts.wait().unflatten(0, (self.num_peers, -1))
        return parts.sum(0, dtype=parts.dtype)
