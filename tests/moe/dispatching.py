"""Routed batches, stand-in experts and drivers for the tests of dispatchers; imported by rank processes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phalanx.moe.dispatch.dispatcher import DispatchConfig, Dispatched
from phalanx.parallel.sim_transport import simulate
from phalanx.parallel.topology import EpTopology
from phalanx.parallel.traffic import Traffic
from phalanx.parallel.transport import Exchange, peers
from phalanx.plugins import load

ALONE = EpTopology.uniform(1, 1)


class Batch(NamedTuple):
    """Of one rank: activations, logical experts (-1 = none), physical slots, router weights."""

    x_TD: Tensor
    ids_TK: Tensor
    slots_TK: Tensor
    weights_TK: Tensor


@dataclass(frozen=True)  # without slots: `padded_T` is kept
class Case:
    topology: EpTopology
    slots_per_rank: int
    physical_to_logical: Tensor
    batches: list[Batch]

    @cached_property
    def padded_T(self) -> int:
        return max(batch.x_TD.shape[0] for batch in self.batches)

    def ranks_of(self, batch: Batch) -> list[list[int]]:
        """Rank of each choice, token by token; -1 = none."""
        return [[slot // self.slots_per_rank if slot >= 0 else -1 for slot in row] for row in batch.slots_TK.tolist()]


def make_case(
    topology: EpTopology,
    num_tokens: Sequence[int],
    *,
    slots_per_rank: int,
    num_experts: int,
    top_k: int,
    hidden_size: int = 4,
    dtype: torch.dtype = torch.float32,
    drop: float = 0.0,
    hot: bool = False,
    zipf: float = 0.0,
    seed: int = 0,
) -> Case:
    """Distinct experts per token, drawn by popularity `rank ** -zipf`; replicas drawn evenly.

    Args:
        drop: probability that a choice is -1.
        hot: every token's first choice is expert 0, and it has no other.
    """
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    num_slots = topology.num_ranks * slots_per_rank
    extra = torch.randint(num_experts, (num_slots - num_experts,), generator=generator)
    shuffled = torch.randperm(num_slots, generator=generator)
    physical_to_logical = torch.cat([torch.arange(num_experts), extra])[shuffled]
    popularity_E = -zipf * torch.arange(1, num_experts + 1).log()
    batches, first = [], 0
    for count in num_tokens:
        gumbel_TE = -torch.log(-torch.log(rand(count, num_experts).clamp(1e-9, 1 - 1e-7)))
        ids_TK = (popularity_E + gumbel_TE).topk(top_k).indices
        ids_TK = ids_TK.masked_fill(rand(count, top_k) < drop, -1)
        if hot:
            ids_TK = torch.full((count, top_k), -1)
            ids_TK[:, 0] = 0
        if num_experts == num_slots:
            logical_to_physical = physical_to_logical.argsort()
            slots_TK = logical_to_physical[ids_TK.clamp(min=0)]
        else:
            holds_TKS = ids_TK[:, :, None] == physical_to_logical
            slots_TK = (holds_TKS * rand(count, top_k, num_slots)).argmax(-1)
        slots_TK = slots_TK.masked_fill(ids_TK < 0, -1)
        x_TD = tokens(first, count, hidden_size, dtype)
        batches.append(Batch(x_TD, ids_TK.int(), slots_TK.int(), rand(count, top_k)))
        first += count
    return Case(topology, slots_per_rank, physical_to_logical, batches)


def tokens(first: int, count: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """Rows that follow from a token's index in the whole group; whole numbers that every dtype holds."""
    index_T1 = torch.arange(first, first + count)[:, None]
    return ((31 * index_T1 + 7 * torch.arange(hidden_size)) % 97 - 48).to(dtype)


def layer(
    case: Case, kind: str, rank: int, *, exact: bool = False, dedup: bool = True
) -> tuple[Any, Exchange[Dispatched]]:
    """(dispatcher, its dispatch under way) of one rank; local computes the logical experts of that rank's batch."""
    batch = case.batches[rank]
    local = kind == "local"
    config = DispatchConfig(
        topology=ALONE if local else case.topology,
        rank=0 if local else rank,
        slots_per_rank=int(case.physical_to_logical.max()) + 1 if local else case.slots_per_rank,
        top_k=batch.slots_TK.shape[1],
        hidden_size=batch.x_TD.shape[1],
        dtype=batch.x_TD.dtype,
        exact=exact,
        dedup=dedup,
    )
    dispatcher = load("moe/dispatch", kind, ("DISPATCHER",)).DISPATCHER(config)
    slots_TK = batch.ids_TK if local else batch.slots_TK
    return dispatcher, dispatcher.dispatch(batch.x_TD, slots_TK, batch.weights_TK, case.padded_T)


def experts(case: Case, kind: str, rank: int, rows: Dispatched, exact: bool) -> Tensor:
    """f_e(x) = (e + 1) / 7 * x in the model's dtype, per choice or weighted and summed in fp32."""
    here_RK = rows.slots_RK >= 0
    ids_RK = rows.slots_RK.long()
    if kind != "local":
        ids_RK = case.physical_to_logical[(ids_RK + rank * case.slots_per_rank).clamp(min=0)]
    factor_RK = ((ids_RK + 1) / 7).masked_fill(~here_RK, 0)
    row_M, choice_M = here_RK.nonzero(as_tuple=True)
    y_MD = (rows.x_RD[row_M].float() * factor_RK[row_M, choice_M, None]).to(rows.x_RD.dtype)
    if exact:
        return y_MD
    y_RD = torch.zeros(rows.x_RD.shape, dtype=torch.float32)
    return y_RD.index_add_(0, row_M, rows.weights_RK[row_M, choice_M, None] * y_MD.float())


def whole_layer(
    case: Case, kind: str, rank: int, *, exact: bool = False, dedup: bool = True
) -> Exchange[tuple[Dispatched, Tensor]]:
    """Dispatch, experts and combine of one rank, whose dispatcher is made at once."""
    dispatcher, dispatching = layer(case, kind, rank, exact=exact, dedup=dedup)

    def exchange() -> Exchange[tuple[Dispatched, Tensor]]:
        rows = yield from dispatching
        out_TD = yield from dispatcher.combine(experts(case, kind, rank, rows, exact), rows.handle)
        return rows, out_TD

    return exchange()


def simulate_layer(
    case: Case, kind: str, *, exact: bool = False, dedup: bool = True
) -> list[tuple[Dispatched, Tensor]]:
    """`whole_layer` on all virtual ranks."""
    ranks = range(case.topology.num_ranks)
    return simulate(case.topology, [whole_layer(case, kind, r, exact=exact, dedup=dedup) for r in ranks])


def local_layer(case: Case, *, exact: bool) -> list[Tensor]:
    """What every kind must give, rank by rank."""
    outputs = []
    for rank in range(case.topology.num_ranks):
        alone = Case(ALONE, case.slots_per_rank, case.physical_to_logical, [case.batches[rank]])
        [(_, out_TD)] = simulate(ALONE, [whole_layer(alone, "local", 0, exact=exact)])
        outputs.append(out_TD)
    return outputs


def traffic_of(case: Case, kind: str, *, exact: bool = False, dedup: bool = True) -> tuple[Traffic, Traffic]:
    """What dispatch and what combine send."""
    topology = case.topology
    going, coming = Traffic(topology), Traffic(topology)
    layers = [layer(case, kind, rank, exact=exact, dedup=dedup) for rank in range(topology.num_ranks)]
    arrived = simulate(topology, [dispatching for _, dispatching in layers], record=going)
    combining = [
        dispatcher.combine(experts(case, kind, rank, rows, exact), rows.handle)
        for rank, ((dispatcher, _), rows) in enumerate(zip(layers, arrived, strict=True))
    ]
    simulate(topology, combining, record=coming)
    return going, coming


def expected_rows(case: Case, kind: str, rank: int) -> Dispatched:
    """Rows that `rank` must receive, token by token, from the documented order."""
    found = [_row(case, rank, source, token) for source, token in _order(case, kind, rank)]
    batch = case.batches[rank]
    top_k = batch.slots_TK.shape[1]
    if not found:
        empty = torch.empty(0, top_k)
        return Dispatched(batch.x_TD[:0], empty.int(), empty, None)
    return Dispatched(*map(torch.stack, zip(*found, strict=True)), None)


def _order(case: Case, kind: str, rank: int) -> Iterator[tuple[int, int]]:
    """(source, token); a token past the batch is padding."""
    topology = case.topology
    if kind == "allgather":
        order = [node[g] for g in range(topology.max_local) for node in topology.nodes if g < len(node)]
        for source in order if topology.is_uniform else range(topology.num_ranks):
            yield from ((source, token) for token in range(case.padded_T))
        return
    sources: list[int] = list(range(topology.num_ranks))
    if kind == "two_hop":
        own = topology.node_of[rank]
        sources = [
            source
            for forwarder in topology.nodes[own]
            for source in peers(topology, forwarder, "rail")
            if topology.forwarder(source, own) == forwarder
        ]
    for source in sources:
        hit = case.ranks_of(case.batches[source])
        yield from ((source, token) for token, ranks in enumerate(hit) if rank in ranks)


def _row(case: Case, rank: int, source: int, token: int) -> tuple[Tensor, Tensor, Tensor]:
    batch = case.batches[source]
    if token >= batch.x_TD.shape[0]:
        top_k = batch.slots_TK.shape[1]
        nowhere_K = torch.full((top_k,), -1, dtype=torch.int32)
        return batch.x_TD.new_zeros(batch.x_TD.shape[1]), nowhere_K, torch.zeros(top_k)
    first = sum(other.x_TD.shape[0] for other in case.batches[:source])
    x_D = tokens(first + token, 1, batch.x_TD.shape[1], batch.x_TD.dtype)[0]
    local_K = [
        slot - rank * case.slots_per_rank if slot // case.slots_per_rank == rank and slot >= 0 else -1
        for slot in batch.slots_TK[token].tolist()
    ]
    slots_K = torch.tensor(local_K, dtype=torch.int32)
    return x_D, slots_K, batch.weights_TK[token] * (slots_K >= 0)
