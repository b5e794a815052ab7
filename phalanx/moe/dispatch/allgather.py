"""Everybody gets every token, and computes those that it has a slot for: no counts, no host read, fixed shapes.

For small decode steps on few nodes, and for CUDA graphs. Rows of all ranks are padded to the same number.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from phalanx.moe.dispatch.dispatcher import DispatchConfig, Dispatched
from phalanx.moe.dispatch.flat import arrived
from phalanx.moe.dispatch.rows import gather_in_order, weigh_up
from phalanx.moe.wire import RowLayout
from phalanx.parallel.transport import AllGather, Exchange, Hop, ReduceScatter

# Shape suffixes: T own tokens, D hidden, K choices per token, R = P * padded_T rows of all ranks.


class Handle(NamedTuple):
    """What `combine` needs; `here_RK` is of the rows, `weights_TK` of the own tokens."""

    here_RK: Tensor
    weights_TK: Tensor


class AllGatherDispatcher:
    """All-gather on the rail, then in the node, and reduce-scatter the reverse; on ragged nodes one flat hop."""

    def __init__(self, config: DispatchConfig) -> None:
        self._config = config
        self._layout = RowLayout(config.hidden_size, config.dtype, config.top_k)
        topology = config.topology
        hops: list[tuple[Hop, int]] = [("rail", topology.num_nodes), ("node", topology.max_local)]
        # A hop of one rank would only copy.
        self._hops: tuple[Hop, ...] = tuple(hop for hop, size in hops if size > 1) if topology.is_uniform else ("flat",)

    def dispatch(
        self, x_TD: Tensor, expert_slots_TK: Tensor, topk_weights_TK: Tensor, padded_T: int
    ) -> Exchange[Dispatched]:
        """See `Dispatcher`; rows are ordered (local, node, padded token), on ragged nodes (rank, padded token).

        Cost: padded_T * (P - 1) rows to receive, padded_T * (N - 1) of them from the own rail, and no host read.
        """
        missing = padded_T - x_TD.shape[0]
        assert missing >= 0, f"{x_TD.shape[0]} tokens, padded_T is {padded_T}"
        weights_TK = topk_weights_TK.masked_fill(expert_slots_TK < 0, 0.0)
        if missing:
            rows_TB = self._layout.pack(
                pad(x_TD, (0, 0, 0, missing)),
                pad(expert_slots_TK, (0, 0, 0, missing), value=-1),
                pad(weights_TK, (0, 0, 0, missing)),
            )
        else:
            rows_TB = self._layout.pack(x_TD, expert_slots_TK, weights_TK)
        for hop in self._hops:
            rows_TB = yield AllGather(hop, rows_TB)
        dispatched = arrived(self._config, self._layout.views(rows_TB), None)
        return dispatched._replace(handle=Handle(dispatched.slots_RK >= 0, weights_TK))

    def combine(self, y: Tensor, handle: Handle) -> Exchange[Tensor]:
        """See `Dispatcher`. Reduced mode sums fp32 on the wire; exact mode places outputs among zeros of their type."""
        num_tokens, top_k = handle.weights_TK.shape
        if self._config.exact:
            choices = y.new_zeros((handle.here_RK.numel(), y.shape[1]))
            choices.index_copy_(0, gather_in_order(handle.here_RK, y.shape[0]).places_n, y)
            y = choices.view(-1, top_k, y.shape[1])
        for hop in reversed(self._hops):
            y = yield ReduceScatter(hop, y)
        y = y[:num_tokens]
        if self._config.exact:
            here_TK = torch.ones_like(handle.weights_TK, dtype=torch.bool)
            rows_XD = y.reshape(-1, y.shape[2])
            return weigh_up(rows_XD, gather_in_order(here_TK, rows_XD.shape[0]), handle.weights_TK)
        return y.to(self._config.dtype)


DISPATCHER = AllGatherDispatcher
