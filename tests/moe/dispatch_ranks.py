"""What ranks do in `test_dispatch_gloo`; imported by rank processes. Cases follow from numbers, so none is sent."""

import torch
from torch import Tensor

from phalanx.parallel.topology import EpTopology
from phalanx.parallel.traffic import CountingTransport, Traffic
from phalanx.parallel.transport import run
from tests.moe.dispatching import Case, make_case, whole_layer
from tests.parallel.ep_programs import connect, meet

TOPOLOGIES = {
    2: (EpTopology.uniform(1, 2), EpTopology.uniform(2, 1)),
    4: (EpTopology.uniform(2, 2), EpTopology(((0, 1, 3), (2,)))),
    8: (EpTopology.uniform(2, 4), EpTopology(((0, 2, 4, 6, 7), (1, 3, 5)))),
}
RUNS = (
    ("flat", False, False),
    *((kind, exact, True) for kind in ("flat", "allgather", "two_hop") for exact in (False, True)),
)
"""(kind, exact, dedup)."""


def cases(size: int) -> list[Case]:
    """Per topology a batch of replicas and empty ranks in each dtype; at last a large even one for the bytes."""
    found = [
        make_case(
            topology,
            [rank * 5 % 7 for rank in range(size)],
            slots_per_rank=3,
            num_experts=3 * size - 1,
            top_k=3,
            hidden_size=24,
            dtype=dtype,
            drop=0.2,
        )
        for topology in TOPOLOGIES[size]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    even = make_case(
        TOPOLOGIES[size][0],
        [256] * size,
        slots_per_rank=256 // size,
        num_experts=256,
        top_k=8,
        hidden_size=16,
    )
    return [*found, even]


def layers(rank: int, address: str, size: int) -> list[list[Tensor]]:
    """For every case and run: the output, then the four arrays of what this rank counted."""
    store = connect(address)
    results = []
    for generation, case in enumerate(cases(size)):
        membership = meet(store, generation, case.topology, rank)
        for kind, exact, dedup in RUNS:
            traffic = Traffic(case.topology)
            exchange = whole_layer(case, kind, rank, exact=exact, dedup=dedup)
            _, out_TD = run(exchange, CountingTransport(membership.transport, traffic))
            results.append([out_TD.float(), *(torch.from_numpy(values) for values in traffic.pairs())])
        membership.destroy()
    return results
