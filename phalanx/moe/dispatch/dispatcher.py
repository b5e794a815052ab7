"""The seam between a layer and the way its tokens travel: `moe/dispatch/<kind>.py` exports `DISPATCHER`.

Kinds: `local` (one rank), `allgather`, `flat`, `two_hop`. Each is a class built once per membership:

    DISPATCHER(topology, rank, slots_per_rank, num_choices=K, hidden_size=D, dtype=..., wire options)

Exact mode: combine returns unweighted, unreduced expert outputs to the token's own rank, which sums them in fp32 with
ascending j; the result's bits depend on no placement, topology or dispatcher. Otherwise ranks and nodes reduce in fp32.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from phalanx.parallel.topology import EpTopology
from phalanx.parallel.transport import Exchange

# Shape suffixes: T own tokens, D hidden, K choices per token, R received rows, M (row, choice) pairs computed here.


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchConfig:
    """What a dispatcher is built for; equal on all ranks of the group but for `rank`.

    Attributes:
        topology, rank: the expert group and this rank's place in it.
        slots_per_rank: s; physical slot p lives on rank `p // s`.
        top_k, hidden_size, dtype: of the rows.
        exact: bits independent of the placement.
        dedup: one copy per (token, rank); False sends one copy per choice, for comparison only (`flat`).
    """

    topology: EpTopology
    rank: int
    slots_per_rank: int
    top_k: int
    hidden_size: int
    dtype: torch.dtype
    exact: bool = False
    dedup: bool = True


class Dispatched(NamedTuple):
    """The rows whose experts live on this rank.

    Attributes:
        x_RD: activations, the model's dtype; R may be 0.
        slots_RK: int32 local slots 0 ... s-1; -1 = not here, or dropped.
        weights_RK: fp32; 0 where the slot is -1.
        handle: what `combine` needs; it exchanges no metadata.
    """

    x_RD: Tensor
    slots_RK: Tensor
    weights_RK: Tensor
    handle: Any


class Dispatcher(Protocol):
    """See the module's docstring; both methods are generators for `transport.run`."""

    def dispatch(
        self, x_TD: Tensor, expert_slots_TK: Tensor, topk_weights_TK: Tensor, padded_T: int
    ) -> Exchange[Dispatched]:
        """Send every token to the ranks that hold its experts; `combine` is the inverse.

        Args:
            x_TD: this rank's tokens; T may be 0 and differ between ranks.
            expert_slots_TK: int32 physical slots of the whole group; -1 = none.
            topk_weights_TK: fp32.
            padded_T: the same on all ranks and >= every rank's T; `allgather` pads to it, others ignore it.
        """

    def combine(self, y: Tensor, handle: Any) -> Exchange[Tensor]:
        """Bring the experts' outputs back and sum them; (T, D) in the model's dtype.

        Args:
            y: reduced mode: (R, D) fp32, weighted and summed over the local choices of each row. Exact mode: (M, D) in
                the model's dtype, unweighted, one per local (row, choice) in row-major order.
            handle: of the `Dispatched`.
        """
