"""Which rows go where, as masks and index lists; shared by the dispatchers.

No sort, and no look at numbers on the device: sizes are arguments, known from counts that the host has read.
A *column* is where a choice goes, plus one: 0 = nowhere, 1 + rank, or 1 + index of a peer.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Shape suffixes: T tokens (or rows), C columns, K choices per token, X places per token, D hidden, n known row count.


class Gather(NamedTuple):
    """Which received rows belong to each token, as compressed lists.

    Attributes:
        rows_n: int64 received rows, token by token.
        starts_T: int64, where the list of each token begins; it may be empty.
        places_n: int64, flat (token, place) of each row.
    """

    rows_n: Tensor
    starts_T: Tensor
    places_n: Tensor


def rank_columns(slots_TK: Tensor, slots_per_rank: int) -> Tensor:
    """(T, K) int64: 1 + rank that holds the slot; 0 where it is -1."""
    return (slots_TK.long() + slots_per_rank).div_(slots_per_rank, rounding_mode="trunc")


def hits(columns_TK: Tensor, num_columns: int) -> Tensor:
    """(num_columns, T) bool: some choice of the token has this column; row 0 = some choice goes nowhere."""
    mask_CT = columns_TK.new_zeros((num_columns, columns_TK.shape[0]), dtype=torch.bool)
    return mask_CT.scatter_(0, columns_TK.t(), True)


def tally(columns_TK: Tensor, num_columns: int) -> Tensor:
    """(num_columns,) int32: how many choices have each column."""
    columns = columns_TK.reshape(-1)
    ones = columns.new_ones((), dtype=torch.int32).expand(columns.shape)
    return columns.new_zeros(num_columns, dtype=torch.int32).scatter_add_(0, columns, ones)


def pick(mask_CT: Tensor, num_rows: int) -> Tensor:
    """(num_rows,) int64: the t of each true (c, t), ordered by c, then t: the tokens in the order they are sent."""
    return torch.nonzero_static(mask_CT, size=num_rows)[:, 1]


def gather_rows(mask_CT: Tensor, num_rows: int, copies: int = 1) -> Gather:
    """For rows that come back in the order of `pick`: where those of each token lie, ascending c.

    Args:
        mask_CT: as in `pick`.
        num_rows: true entries.
        copies: so many neighbours of T are one token.
    """
    row_TC = mask_CT.view(-1).cumsum(0).view(mask_CT.shape).t()
    return _gather(mask_CT.t().reshape(-1, copies * mask_CT.shape[0]), row_TC.reshape(-1).sub_(1), num_rows)


def gather_choices(columns_TK: Tensor, num_columns: int, num_rows: int) -> Gather:
    """For one row per choice, ordered by column, token, choice: where those of each token lie, ascending choice."""
    mask_CX = hits(columns_TK.reshape(-1, 1), num_columns)[1:]
    order_n = pick(mask_CX, num_rows)
    row_X = order_n.new_zeros(columns_TK.numel())
    row_X[order_n] = torch.arange(num_rows, device=order_n.device)
    return _gather(columns_TK > 0, row_X, num_rows)


def gather_in_order(here_TK: Tensor, num_rows: int) -> Gather:
    """For one row per choice that is here, ordered by token, choice."""
    order_n = torch.arange(num_rows, device=here_TK.device)
    return Gather(order_n, _starts(here_TK), _true(here_TK, num_rows))


def add_up(rows_nD: Tensor, gather: Gather) -> Tensor:
    """(T, D): the sum of each token's rows, added in fp32 in list order, rounded once to the rows' type; 0 if none.

    One thread adds a list from its first row to its last, on CUDA too: the result does not change between runs.
    """
    return torch.embedding_bag(rows_nD, gather.rows_n, gather.starts_T)[0]


def weigh_up(rows_nD: Tensor, gather: Gather, weights_TK: Tensor) -> Tensor:
    """(T, D): the weighted sum of each token's choices in fp32, ascending choice, rounded once to the rows' type."""
    weights_n = weights_TK.reshape(-1).index_select(0, gather.places_n)
    total_TD = torch.embedding_bag(rows_nD.float(), gather.rows_n, gather.starts_T, per_sample_weights=weights_n)[0]
    return total_TD.to(rows_nD.dtype)


def _gather(here_TX: Tensor, row_of_place: Tensor, num_rows: int) -> Gather:
    places_n = _true(here_TX, num_rows)
    return Gather(row_of_place.index_select(0, places_n), _starts(here_TX), places_n)


def _true(mask: Tensor, num_true: int) -> Tensor:
    return torch.nonzero_static(mask.reshape(-1), size=num_true).view(-1)


def _starts(here_TX: Tensor) -> Tensor:
    count_T = here_TX.sum(1)
    return count_T.cumsum(0).sub_(count_T)
