"""Exchanges between the ranks of an expert group: what a dispatcher asks for, as data, and who carries it out.

A dispatcher is a generator that yields requests and is sent their results:

    received = yield AllToAll("rail", rows, send, receive)

so that one text runs over torch.distributed, over P virtual ranks in one process, and under a counter. `run` drives one
generator over one transport.

    hop "flat"   all P ranks                                  peers = (0, ..., P-1)
    hop "rail"   one rank per node, equal local index         peers[n] = forwarder(self, n); ragged nodes: all P ranks
    hop "node"   the ranks of this rank's node                peers = topology.nodes[node]
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from phalanx.parallel.topology import EpTopology

Hop = Literal["flat", "rail", "node"]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class AllToAll:
    """Rows to each peer and from each peer, ordered by peer. Result: (sum(receive), ...) rows, in the order of `peers`.

    Attributes:
        rows: (sum(send), ...) contiguous, any dtype but fp8; also with zero rows the call is made.
        send, receive: rows per entry of `peers(hop)`.
    """

    hop: Hop
    rows: Tensor
    send: tuple[int, ...]
    receive: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """One fixed-size int32 row to and from each peer. Result: (len(peers), W)."""

    hop: Hop
    rows: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AllGather:
    """The same number of rows from everybody. Result: (len(peers) * n, ...), in the order of `peers`."""

    hop: Hop
    rows: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ReduceScatter:
    """Sum over the ranks; each keeps its part. rows: (len(peers) * n, ...). Result: (n, ...)."""

    hop: Hop
    rows: Tensor


Request = AllToAll | Counts | AllGather | ReduceScatter
Exchange = Generator[Request, Tensor, Result]
"""A generator of requests that returns a `Result`."""


class Pending(Protocol):
    """An exchange under way."""

    def wait(self) -> Tensor:
        """The result; on CUDA the current stream waits, not the host."""


class Transport(Protocol):
    """Carries out requests for one rank; every rank of the group makes the same requests in the same order."""

    @property
    def rank(self) -> int:
        """Of this rank in the expert group."""

    @property
    def topology(self) -> EpTopology:
        """Of the expert group."""

    def start(self, request: Request) -> Pending:
        """Begin an exchange."""


def peers(topology: EpTopology, rank: int, hop: Hop) -> tuple[int, ...]:
    """Expert-group ranks that `rank` exchanges with on a hop, itself included, in the order of splits and results.

    On the rail of ragged nodes that is the whole group: forwarders are not one-to-one there, most splits are zero.
    """
    if hop == "node":
        return topology.nodes[topology.node_of[rank]]
    if hop == "rail" and topology.is_uniform:
        return tuple(ranks[topology.local_of[rank]] for ranks in topology.nodes)
    return tuple(range(topology.num_ranks))


def run(exchange: Exchange[Result], transport: Transport | None, meanwhile: Callable[[], None] | None = None) -> Result:
    """Drive a generator to its end; `meanwhile` runs once, beside the first payload on its way.

    Without a transport the exchange must be one that makes no request (a single rank).
    """
    result: Tensor | None = None
    try:
        while True:
            request = next(exchange) if result is None else exchange.send(result)
            assert transport is not None, "a rank without a transport makes no request"
            pending = transport.start(request)
            if meanwhile is not None and not isinstance(request, Counts):
                meanwhile()
                meanwhile = None
            result = pending.wait()
    except StopIteration as stop:
        if meanwhile is not None:
            meanwhile()
        value: Result = stop.value
        return value


def empty_rows(like: Tensor, num_rows: int) -> Tensor:
    """(num_rows, ...) uninitialised rows as those of `like`."""
    return torch.empty((num_rows, *like.shape[1:]), dtype=like.dtype, device=like.device)
