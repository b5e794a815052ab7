"""Who sent how much to whom: counted payloads of an expert group, for exact checks and for the cost model."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phalanx.parallel.topology import EpTopology
from phalanx.parallel.transport import AllGather, AllToAll, Counts, Hop, Pending, Request, Transport, peers

Kind = Literal["all_to_all", "counts", "all_gather", "reduce_scatter"]
Tier = Literal["inter", "intra"]
Ints = NDArray[np.int64]

COMPACT_AT = 4096
"""Records kept apart before they are added up."""


class Sent(NamedTuple):
    """Totals per (source, target) pair of ranks: four equally long arrays."""

    sources: Ints
    targets: Ints
    num_bytes: Ints
    num_messages: Ints


@dataclass(slots=True)
class Traffic:
    """Counts of what ranks sent. A message is one non-empty payload to one other rank; what a rank keeps is not sent.

    All-gather and reduce-scatter count as if every rank sent its part to every peer itself, whatever algorithm carries
    it: that is what arrives in the end.

    Queries take `hop` and `kind` to count these alone. Without a `kind` they count payloads, that is all but `counts`.
    """

    topology: EpTopology
    _records: dict[tuple[Hop, Kind], list[Sent]] = field(default_factory=dict)

    def sent(self, rank: int, request: Request) -> None:
        """`rank` makes this request."""
        hop, kind = request.hop, _kind(request)
        targets = np.array(peers(self.topology, rank, hop))
        num_bytes = _bytes_per_peer(request, len(targets))
        some = (num_bytes > 0) & (targets != rank)
        targets, num_bytes = targets[some], num_bytes[some]
        self._append(hop, kind, Sent(np.full_like(targets, rank), targets, num_bytes, np.ones_like(targets)))

    def add(self, other: "Traffic") -> None:
        """Add what another recorder counted, for example that of another rank process."""
        for (hop, kind), records in other._records.items():
            for record in records:
                self._append(hop, kind, record)

    def clear(self) -> None:
        """Start again from zero."""
        self._records.clear()

    def pairs(self, *, hop: Hop | None = None, kind: Kind | None = None) -> Sent:
        """Totals per pair of ranks that exchanged anything, ordered by (source, target)."""
        return self._sum(
            [
                record
                for (its_hop, its_kind), records in self._records.items()
                if hop in (None, its_hop) and (its_kind == kind if kind else its_kind != "counts")
                for record in records
            ]
        )

    def node_bytes(self, *, hop: Hop | None = None, kind: Kind | None = None) -> Ints:
        """(N, N) bytes from node to node; the diagonal is traffic inside a node."""
        pairs = self.pairs(hop=hop, kind=kind)
        return self._per_node(pairs, pairs.num_bytes)

    def bytes_of(self, rank: int, tier: Tier | None = None, *, hop: Hop | None = None, kind: Kind | None = None) -> int:
        """Bytes that `rank` sent: to other nodes ("inter"), inside its own ("intra"), or both."""
        pairs = self.pairs(hop=hop, kind=kind)
        return int(pairs.num_bytes[self._of(pairs, rank, tier)].sum())

    def messages_of(
        self, rank: int, tier: Tier | None = None, *, hop: Hop | None = None, kind: Kind | None = None
    ) -> int:
        """Messages that `rank` sent: to other nodes ("inter"), inside its own ("intra"), or both."""
        pairs = self.pairs(hop=hop, kind=kind)
        return int(pairs.num_messages[self._of(pairs, rank, tier)].sum())

    def total(self, tier: Tier | None = None, *, hop: Hop | None = None, kind: Kind | None = None) -> int:
        """Bytes that all ranks sent: between nodes ("inter"), inside nodes ("intra"), or both."""
        per_node = self.node_bytes(hop=hop, kind=kind)
        inside = int(per_node.trace())
        return {None: int(per_node.sum()), "intra": inside, "inter": int(per_node.sum()) - inside}[tier]

    def receive_skew(self, *, hop: Hop | None = None, kind: Kind | None = None) -> float:
        """Bytes received from other nodes, busiest rank over the mean rank: the NIC max/mean. 1.0 if nothing was sent.

        One NIC per rank is assumed, as in machines with one NIC per GPU.
        """
        pairs = self.pairs(hop=hop, kind=kind)
        node_of = np.array(self.topology.node_of)
        inter = node_of[pairs.sources] != node_of[pairs.targets]
        received = np.zeros(self.topology.num_ranks, dtype=np.int64)
        np.add.at(received, pairs.targets[inter], pairs.num_bytes[inter])
        mean = float(received.mean())
        return float(received.max()) / mean if mean else 1.0

    def _append(self, hop: Hop, kind: Kind, record: Sent) -> None:
        records = self._records.setdefault((hop, kind), [])
        records.append(record)
        if len(records) >= COMPACT_AT:
            records[:] = [self._sum(records)]

    def _sum(self, records: list[Sent]) -> Sent:
        if not records:
            nothing = np.zeros(0, dtype=np.int64)
            return Sent(nothing, nothing, nothing, nothing)
        sources, targets, num_bytes, num_messages = map(np.concatenate, zip(*records, strict=True))
        pairs, which = np.unique(sources * self.topology.num_ranks + targets, return_inverse=True)
        totals = np.zeros((2, len(pairs)), dtype=np.int64)
        np.add.at(totals[0], which, num_bytes)
        np.add.at(totals[1], which, num_messages)
        return Sent(*np.divmod(pairs, self.topology.num_ranks), *totals)

    def _per_node(self, pairs: Sent, values: Ints) -> Ints:
        node_of = np.array(self.topology.node_of)
        matrix = np.zeros((self.topology.num_nodes, self.topology.num_nodes), dtype=np.int64)
        np.add.at(matrix, (node_of[pairs.sources], node_of[pairs.targets]), values)
        return matrix

    def _of(self, pairs: Sent, rank: int, tier: Tier | None) -> NDArray[np.bool_]:
        node_of = np.array(self.topology.node_of)
        mine: NDArray[np.bool_] = pairs.sources == rank
        same_node = node_of[pairs.targets] == node_of[rank]
        if tier is not None:
            mine &= same_node if tier == "intra" else ~same_node
        return mine


class CountingTransport:
    """Another transport whose requests are counted; each rank counts what it sends itself."""

    def __init__(self, inner: Transport, traffic: Traffic) -> None:
        self.inner = inner
        self.traffic = traffic

    @property
    def rank(self) -> int:
        """Of this rank in the expert group."""
        return self.inner.rank

    @property
    def topology(self) -> EpTopology:
        """Of the expert group."""
        return self.inner.topology

    def start(self, request: Request) -> Pending:
        """Count, then begin the exchange."""
        self.traffic.sent(self.rank, request)
        return self.inner.start(request)


def _kind(request: Request) -> Kind:
    match request:
        case AllToAll():
            return "all_to_all"
        case Counts():
            return "counts"
        case AllGather():
            return "all_gather"
        case _:
            return "reduce_scatter"


def _bytes_per_peer(request: Request, num_peers: int) -> Ints:
    rows = request.rows
    row_bytes = rows[:1].nbytes if len(rows) else rows.new_empty((1, *rows.shape[1:])).nbytes
    match request:
        case AllToAll():
            return np.array(request.send, dtype=np.int64) * row_bytes
        case AllGather():
            return np.full(num_peers, len(rows) * row_bytes, dtype=np.int64)
        case _:
            return np.full(num_peers, len(rows) // num_peers * row_bytes, dtype=np.int64)
