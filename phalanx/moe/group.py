"""One rank's place in the expert group, shared by the MoE layers of its stage: transport, dispatchers, replica tables.

The engine owns which expert lives where; this holds the rank's copy. `flip` and `enter` change it between two steps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from phalanx import plugins
from phalanx.kernels.registry import bind
from phalanx.moe.dispatch.dispatcher import DispatchConfig, Dispatcher
from phalanx.moe.load import LoadCounter
from phalanx.moe.placement.types import LayerPlacement, slots_of
from phalanx.moe.replicas import ReplicaTables
from phalanx.parallel.topology import EpTopology
from phalanx.parallel.transport import Exchange, Result, Transport, run

ALONE = "alone"
"""Kind of a step without peers: tokens visit experts of this rank, whichever they asked for. Only for warm-up."""


@dataclass(frozen=True, slots=True)
class EpStep:
    """What the MoE layers must know about a step; the same on all ranks but for the tensors.

    Attributes:
        kind: of the dispatcher, chosen by the engine.
        padded_T: at least every rank's rows after the tensor ranks shared them.
        key_T: [T] int64, a number of (request, position): chooses among replicas, so that a token always takes the
            same one, whatever is in the batch. None = rows have no request (warm-up).
        scope_T: [T] int64, equal for tokens of one request; None unless a capacity limit counts by it.
        task_T: [T] int64, task of each token's request; None unless the model has tasks (then: task 0, warm-up).
    """

    kind: str
    padded_T: int
    key_T: Tensor | None = None
    scope_T: Tensor | None = None
    task_T: Tensor | None = None


class ExpertGroup:
    """The dp x tp ranks of a pipeline stage, seen from one of them.

    Args:
        topology: of the group.
        rank: of this member.
        placements: of the stage's MoE layers, in order.
        slots_per_rank: physical slots of every rank in a layer with as many experts; `slots_of` for the others.
        exact: bits of the result do not depend on the placement or the dispatcher.
        device: of the tables.
        choose: op name -> implementation name.
    """

    def __init__(
        self,
        topology: EpTopology,
        rank: int,
        placements: Sequence[LayerPlacement],
        slots_per_rank: int,
        *,
        exact: bool,
        device: torch.device,
        choose: Mapping[str, str] | None = None,
    ) -> None:
        self.slots_per_rank, self.exact, self.device = slots_per_rank, exact, device
        self.route_op = bind("moe_route", device=device, dtype=torch.float32, choose=choose)
        self.load = LoadCounter([len(placement.num_replicas) for placement in placements], device)
        self.transport: Transport | None = None
        self._place(topology, rank, placements)

    def enter(self, transport: Transport, placements: Sequence[LayerPlacement]) -> None:
        """Become a member of another generation; the caller closes the old one's groups."""
        self.transport = transport
        self._place(transport.topology, transport.rank, placements)

    def _place(self, topology: EpTopology, rank: int, placements: Sequence[LayerPlacement]) -> None:
        self.topology, self.rank = topology, rank
        self.placements = list(placements)
        self.tables = [
            ReplicaTables.of(placement, topology, self.slots_of(layer), self.device)
            for layer, placement in enumerate(placements)
        ]
        self._dispatchers: dict[tuple[str, int, int, int, torch.dtype], Dispatcher] = {}

    def flip(self, layer: int, placement: LayerPlacement) -> None:
        """Switch one MoE layer of the stage to another placement of the same group."""
        self.placements[layer] = placement
        self.tables[layer].overwrite(placement)

    def slots_of(self, layer: int) -> int:
        """Physical slots of every rank in a layer."""
        return slots_of(self.placements[layer].num_experts, self.slots_per_rank)

    def experts_of(self, layer: int) -> tuple[int, ...]:
        """Logical experts of this rank's slots, in slot order."""
        return self.placements[layer].experts_of(self.rank, self.slots_of(layer))

    def dispatcher(self, kind: str, layer: int, top_k: int, hidden_size: int, dtype: torch.dtype) -> Dispatcher:
        """The dispatcher of a kind for rows of a shape, made once per generation for all layers of equal slots."""
        slots_per_rank = self.slots_of(layer)
        key = (kind, slots_per_rank, top_k, hidden_size, dtype)
        if key not in self._dispatchers:
            alone = kind == ALONE
            config = DispatchConfig(
                topology=EpTopology.uniform(1, 1) if alone else self.topology,
                rank=0 if alone else self.rank,
                slots_per_rank=slots_per_rank,
                top_k=top_k,
                hidden_size=hidden_size,
                dtype=dtype,
                exact=self.exact,
            )
            made = plugins.load("moe/dispatch", "local" if alone else kind, ("DISPATCHER",)).DISPATCHER(config)
            self._dispatchers[key] = cast(Dispatcher, made)
        return self._dispatchers[key]

    def run(self, exchange: Exchange[Result], meanwhile: Callable[[], None] | None = None) -> Result:
        """Carry out an exchange on this rank; a group of one makes no requests."""
        return run(exchange, self.transport, meanwhile)
