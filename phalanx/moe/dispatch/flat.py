"""One all-to-all over the whole group, one copy per (token, rank). The kind for a single node."""

from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.errors import ConfigError
from phalanx.moe.dispatch.dispatcher import DispatchConfig, Dispatched
from phalanx.moe.dispatch.rows import add_up, gather_choices, gather_rows, hits, pick, rank_columns, tally, weigh_up
from phalanx.moe.wire import RowLayout, Rows
from phalanx.parallel.transport import AllToAll, Counts, Exchange

# Shape suffixes: T own tokens, P ranks, D hidden, K choices per token, R received rows, n sent rows.

Splits = tuple[int, ...]


class Handle(NamedTuple):
    """What `combine` needs; splits are by rank, of rows in reduced mode, of choices in exact mode."""

    sent_PT: Tensor
    rank_column_TK: Tensor
    weights_TK: Tensor
    back_out: Splits
    back_in: Splits


class FlatDispatcher:
    """Counts, then rows, to every rank of the group.

    Raises:
        ConfigError: exact mode without `dedup`.
    """

    def __init__(self, config: DispatchConfig) -> None:
        if config.exact and not config.dedup:
            raise ConfigError("dispatch: exact mode does not go with dedup = False, which is for comparison; drop one")
        self._config = config
        self._layout = RowLayout(config.hidden_size, config.dtype, config.top_k)

    def dispatch(
        self, x_TD: Tensor, expert_slots_TK: Tensor, topk_weights_TK: Tensor, padded_T: int
    ) -> Exchange[Dispatched]:
        """See `Dispatcher`; rows are ordered by source rank, then token.

        Cost: one read of 2 P numbers by the host; T * E[ranks] rows; P - 1 messages.
        """
        config, num_ranks = self._config, self._config.topology.num_ranks
        rank_column_TK = rank_columns(expert_slots_TK, config.slots_per_rank)
        if config.dedup:
            sent_PT = hits(rank_column_TK, num_ranks + 1)[1:]
        else:
            sent_PT = hits(rank_column_TK.reshape(-1, 1), num_ranks + 1)[1:]
        counts_PW = sent_PT.sum(1, keepdim=True, dtype=torch.int32)
        if config.exact:
            counts_PW = torch.cat([counts_PW, tally(rank_column_TK, num_ranks + 1)[1:, None]], dim=1)
        theirs_PW = yield Counts("flat", counts_PW)
        splits = [tuple(column) for column in torch.cat([counts_PW, theirs_PW], dim=1).t().tolist()]
        width = counts_PW.shape[1]
        rows_out, rows_in = splits[0], splits[width]
        handle = Handle(sent_PT, rank_column_TK, topk_weights_TK, back_out=splits[-1], back_in=splits[width - 1])

        if not config.dedup:
            x_TD, expert_slots_TK, topk_weights_TK = _one_choice_per_row(x_TD, expert_slots_TK, topk_weights_TK)
        wire_TB = self._layout.pack(x_TD, expert_slots_TK, topk_weights_TK)
        wire_nB = wire_TB.index_select(0, pick(sent_PT, sum(rows_out)))
        wire_RB = yield AllToAll("flat", wire_nB, rows_out, rows_in)
        return arrived(config, self._layout.views(wire_RB), handle)

    def combine(self, y: Tensor, handle: Handle) -> Exchange[Tensor]:
        """See `Dispatcher`."""
        out, back = handle.back_out, handle.back_in
        if self._config.exact:
            rows_nD = yield AllToAll("flat", y, out, back)
            choices = gather_choices(handle.rank_column_TK, self._config.topology.num_ranks + 1, sum(back))
            return weigh_up(rows_nD, choices, handle.weights_TK)
        rows_nD = yield AllToAll("flat", y.to(self._config.dtype), out, back)
        copies = 1 if self._config.dedup else self._config.top_k
        return add_up(rows_nD, gather_rows(handle.sent_PT, sum(back), copies))


def arrived(config: DispatchConfig, rows: Rows, handle: object) -> Dispatched:
    """What a rank computes of the rows it received: slots become local ones; those of other ranks -1, weight 0."""
    away_RK = rows.slots_RK.div(config.slots_per_rank, rounding_mode="floor") != config.rank
    slots_RK = (rows.slots_RK - config.rank * config.slots_per_rank).masked_fill_(away_RK, -1)
    return Dispatched(rows.x_RD, slots_RK, rows.weights_RK.masked_fill(away_RK, 0.0), handle)


def _one_choice_per_row(x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    top_k = slots_TK.shape[1]
    others_KK = ~torch.eye(top_k, dtype=torch.bool, device=slots_TK.device)
    slots_XK = slots_TK[:, None].masked_fill(others_KK, -1).view(-1, top_k)
    return x_TD.repeat_interleave(top_k, 0), slots_XK, weights_TK.repeat_interleave(top_k, 0)


DISPATCHER = FlatDispatcher
