"""The exchanges of a MoE layer with made-up tokens and no experts: what calibration times."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from phalanx import plugins
from phalanx.moe.dispatch.dispatcher import DispatchConfig, Dispatched, Dispatcher
from phalanx.parallel.costmodel import ExpertTraffic, Kind
from phalanx.parallel.topology import EpTopology
from phalanx.parallel.transport import Exchange, Transport, run

# Shape suffixes: T tokens, D hidden, E experts, K choices, R received rows, M (row, choice) pairs.


@dataclass(frozen=True, slots=True)
class Probe:
    """A layer's shape.

    Attributes:
        traffic: of the layer.
        hidden_size, dtype: of its rows.
        device: of the rows.
    """

    traffic: ExpertTraffic
    hidden_size: int
    dtype: torch.dtype
    device: torch.device

    def layer(self, transport: Transport, kind: Kind, num_tokens: int) -> Callable[[], object]:
        """Dispatch and combine `num_tokens` of this rank, routed evenly; all ranks call it together.

        The dispatcher is the one that serves, so that its work on masks and indices is timed with the bytes.
        """
        exchange = self.exchange(transport.topology, transport.rank, kind, num_tokens)
        return lambda: run(exchange(), transport)

    def exchange(self, topology: EpTopology, rank: int, kind: Kind, num_tokens: int) -> Callable[[], Exchange[Tensor]]:
        """What `layer` runs, without a transport."""
        num_experts, top_k = self.traffic.num_experts, self.traffic.top_k
        slots_per_rank = -(-num_experts // topology.num_ranks)
        config = DispatchConfig(
            topology=topology,
            rank=rank,
            slots_per_rank=slots_per_rank,
            top_k=top_k,
            hidden_size=self.hidden_size,
            dtype=self.dtype,
            exact=self.traffic.exact,
        )
        dispatcher: Dispatcher = plugins.load("moe/dispatch", kind, ("DISPATCHER",)).DISPATCHER(config)
        generator = torch.Generator().manual_seed(rank)
        order_TE = torch.rand((num_tokens, num_experts), generator=generator).argsort(1)
        # Fewer experts than ranks lie spread over them, as replicas would.
        spread_TK = order_TE[:, :top_k] * (slots_per_rank * topology.num_ranks) // num_experts
        slots_TK = spread_TK.to(self.device, torch.int32).contiguous()
        weights_TK = torch.ones(slots_TK.shape, device=self.device)
        # Not zeros: memory that nobody has written is one page of the kernel, always in the cache.
        x_TD = torch.ones((num_tokens, self.hidden_size), dtype=self.dtype, device=self.device)

        def exchange() -> Exchange[Tensor]:
            rows: Dispatched = yield from dispatcher.dispatch(x_TD, slots_TK, weights_TK, num_tokens)
            return (yield from dispatcher.combine(self._outputs(rows), rows.handle))

        return exchange

    def _outputs(self, rows: Dispatched) -> Tensor:
        """Of experts that change nothing: (M, D) in exact mode, else (R, D) fp32, weighted and summed."""
        if not self.traffic.exact:
            return rows.x_RD.float() * rows.weights_RK.sum(1, keepdim=True)
        rows_M = (rows.slots_RK >= 0).nonzero()[:, 0]
        return rows.x_RD.index_select(0, rows_M)
