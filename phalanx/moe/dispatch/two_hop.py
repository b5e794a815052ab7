"""Network first on the rail, then inside the node; back the reverse, reduced inside the node before crossing.

One copy per (token, node) crosses, and a hot expert's traffic is spread over all NICs of its node.

    source (m, g) --rail--> forwarder (n, g) --node--> owner (n, g')        forwarder = rank of node n with source's g

Ragged nodes wrap g (`EpTopology.forwarder`), so forwarders are not one-to-one: the rail is then the whole group, with
zero splits for all but the forwarders, and count rows are as wide as the largest node.

Source: DeepSpeed-MoE (arXiv:2201.05596) sec. 5; Tutel (arXiv:2206.03382); the order of the hops is ours.
"""

from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.moe.dispatch.dispatcher import DispatchConfig, Dispatched
from phalanx.moe.dispatch.flat import Splits, arrived
from phalanx.moe.dispatch.rows import (
    Gather,
    add_up,
    gather_choices,
    gather_rows,
    hits,
    pick,
    rank_columns,
    tally,
    weigh_up,
)
from phalanx.moe.wire import RowLayout
from phalanx.parallel.transport import AllToAll, Counts, Exchange, peers

# Shape suffixes: T own tokens, F rows at the forwarder, R received rows, D hidden, K choices per token, B bytes of a
# wire row; N peers of the rail, G ranks of this node, P + 2 columns: nowhere, the ranks, never (for padding).


class HopSplits(NamedTuple):
    """By peer: rows out and in; on the way back as many, in exact mode as many choices as they have there."""

    rows_out: Splits
    rows_in: Splits
    back_out: Splits
    back_in: Splits


class Hop(NamedTuple):
    """What the way back over a hop needs.

    Attributes:
        column: int64, where each choice of a row goes, (T, K) or (F, K).
        sent: bool, which rows go to which peer, (N, T) or (G, F).
        splits: of the rows.
    """

    column: Tensor
    sent: Tensor
    splits: HopSplits


class Handle(NamedTuple):
    """What `combine` needs."""

    rail: Hop
    node: Hop
    weights_TK: Tensor


class Tables(NamedTuple):
    """Where ranks lie, on the device; indices are rank columns.

    Attributes:
        rail_column: (P + 1,) int64: 1 + rail peer that forwards to the rank.
        node_column: (P + 1,) int64: 1 + local index, 0 for ranks of other nodes.
        ranks_behind: (N, G of the largest node) int64 rank columns of the node behind each rail peer.
    """

    rail_column: Tensor
    node_column: Tensor
    ranks_behind: Tensor


class TwoHopDispatcher:
    """Two all-to-alls each way: N - 1 and G - 1 messages instead of P - 1."""

    def __init__(self, config: DispatchConfig) -> None:
        self._config = config
        self._layout = RowLayout(config.hidden_size, config.dtype, config.top_k)
        self._node_size = len(peers(config.topology, config.rank, "node"))
        self._tables = _tables(config)

    def dispatch(
        self, x_TD: Tensor, expert_slots_TK: Tensor, topk_weights_TK: Tensor, padded_T: int
    ) -> Exchange[Dispatched]:
        """See `Dispatcher`; rows are ordered by forwarder, source node, token.

        Cost: one read of 2 N + 2 G numbers by the host; T * E[nodes] rows on the rail, T * E[ranks] in the node.
        """
        config, layout = self._config, self._layout
        rail, splits = yield from self._count(expert_slots_TK)
        wire_TB = layout.pack(x_TD, expert_slots_TK, topk_weights_TK)
        wire_FB = wire_TB.index_select(0, pick(rail.sent, sum(rail.splits.rows_out)))
        wire_FB = yield AllToAll("rail", wire_FB, rail.splits.rows_out, rail.splits.rows_in)

        column_FK = self._tables.node_column.take(rank_columns(layout.slots(wire_FB), config.slots_per_rank))
        node = Hop(column_FK, hits(column_FK, 1 + self._node_size)[1:], splits)
        wire_RB = wire_FB.index_select(0, pick(node.sent, sum(splits.rows_out)))
        wire_RB = yield AllToAll("node", wire_RB, splits.rows_out, splits.rows_in)
        return arrived(config, layout.views(wire_RB), Handle(rail, node, topk_weights_TK))

    def combine(self, y: Tensor, handle: Handle) -> Exchange[Tensor]:
        """See `Dispatcher`. Reduced mode: the forwarder adds its node's rows in fp32, so one row per node crosses."""
        rail, node = handle.rail, handle.node
        if self._config.exact:
            rows = yield AllToAll("node", y, node.splits.back_out, node.splits.back_in)
            rows = rows.index_select(0, _choices(node).rows_n)
            rows = yield AllToAll("rail", rows, rail.splits.back_out, rail.splits.back_in)
            return weigh_up(rows, _choices(rail), handle.weights_TK)
        rows = yield AllToAll("node", y.to(self._config.dtype), node.splits.back_out, node.splits.back_in)
        rows = add_up(rows, gather_rows(node.sent, rows.shape[0]))
        rows = yield AllToAll("rail", rows, rail.splits.back_out, rail.splits.back_in)
        return add_up(rows, gather_rows(rail.sent, rows.shape[0]))

    def _count(self, slots_TK: Tensor) -> Exchange[tuple[Hop, HopSplits]]:
        """Exchange counts on both hops and read them at once; returns the rail and the node's splits.

        A rail row is [rows for that node, rows for each of its ranks, and in exact mode choices for each of its ranks].
        """
        config, num_columns = self._config, self._config.topology.num_ranks + 2
        if self._tables.rail_column.device != slots_TK.device:
            self._tables = Tables(*(table.to(slots_TK.device) for table in self._tables))
        rail_column, _, ranks_behind = self._tables
        rank_column_TK = rank_columns(slots_TK, config.slots_per_rank)
        column_TK = rail_column.take(rank_column_TK)
        sent_NT = hits(column_TK, 1 + ranks_behind.shape[0])[1:]
        per_rank = [hits(rank_column_TK, num_columns).sum(1, dtype=torch.int32)]
        if config.exact:
            per_rank.append(tally(rank_column_TK, num_columns))
        rows_N1 = sent_NT.sum(1, keepdim=True, dtype=torch.int32)
        mine_NW = torch.cat([rows_N1, *(counts.take(ranks_behind) for counts in per_rank)], dim=1)
        theirs_NW = yield Counts("rail", mine_NW)

        # What all sources have for each rank of this node is what this rank, their forwarder, sends there.
        for_node = theirs_NW[:, 1:].sum(0, dtype=torch.int32).view(len(per_rank), -1)
        mine_GW = for_node[:, : self._node_size].t().contiguous()
        theirs_GW = yield Counts("node", mine_GW)

        read = [mine_NW[:, 0], theirs_NW[:, 0], *mine_GW.unbind(1), *theirs_GW.unbind(1)]
        if config.exact:
            first = 1 + config.topology.max_local
            read += [mine_NW[:, first:].sum(1, dtype=torch.int32), theirs_NW[:, first:].sum(1, dtype=torch.int32)]
        numbers = iter(torch.cat(read).tolist())
        splits = [tuple(islice(numbers, len(part))) for part in read]
        if config.exact:
            rail_out, rail_in, out, back_in, into, back_out, rail_back_in, rail_back_out = splits
        else:
            rail_out, rail_in, out, into = rail_back_in, rail_back_out, back_in, back_out = splits
        rail = Hop(column_TK, sent_NT, HopSplits(rail_out, rail_in, rail_back_out, rail_back_in))
        return rail, HopSplits(out, into, back_out, back_in)


def _choices(hop: Hop) -> Gather:
    return gather_choices(hop.column, 1 + len(hop.splits.back_in), sum(hop.splits.back_in))


def _tables(config: DispatchConfig) -> Tables:
    """For one rank, on the CPU."""
    topology, rank = config.topology, config.rank
    index = {peer: 1 + i for i, peer in enumerate(peers(topology, rank, "rail"))}
    via_N = torch.tensor([index[topology.forwarder(rank, node)] for node in range(topology.num_nodes)])
    node_P, local_P = torch.tensor(topology.node_of), torch.tensor(topology.local_of)
    via_P, ranks_P = via_N[node_P], torch.arange(1, 1 + topology.num_ranks)
    ranks_behind = torch.full((len(index), topology.max_local), 1 + topology.num_ranks)
    ranks_behind[via_P - 1, local_P] = ranks_P
    own_P = (1 + local_P).masked_fill(node_P != topology.node_of[rank], 0)
    nowhere = torch.zeros(1, dtype=torch.int64)
    return Tables(torch.cat([nowhere, via_P]), torch.cat([nowhere, own_P]), ranks_behind)


DISPATCHER = TwoHopDispatcher
