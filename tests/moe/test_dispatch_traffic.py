"""Bytes and messages of dispatch and combine: exact sums per rank, expected copies per token, balance of NICs, scale.

The formulas are those of sections 5.1 and 14 of the area note. Runs in 10 s.
"""

import math
import time

import numpy as np
import pytest
import torch

from phalanx.moe.wire import RowLayout
from phalanx.parallel.sim_transport import simulate
from phalanx.parallel.topology import EpTopology
from phalanx.parallel.traffic import Traffic
from tests.moe.dispatching import Case, local_layer, make_case, traffic_of, whole_layer

TOPOLOGIES = {
    "1x4": EpTopology.uniform(1, 4),
    "4x1": EpTopology.uniform(4, 1),
    "3x4": EpTopology.uniform(3, 4),
    "6+3": EpTopology(((0, 1, 2, 3, 4, 5), (6, 7, 8))),
    "interleaved": EpTopology(((1, 4), (0, 2, 5), (3,))),
}
HIDDEN = 12


def routed(topology: EpTopology, num_tokens: int = 7, **options) -> Case:
    counts = [num_tokens * (rank % 3 > 0) for rank in range(topology.num_ranks)]
    shape = {"slots_per_rank": 3, "num_experts": 3 * topology.num_ranks, "top_k": 4, "hidden_size": HIDDEN}
    return make_case(topology, counts, **shape, drop=0.2, **options)


def wire_bytes(case: Case) -> int:
    batch = case.batches[0]
    return RowLayout(batch.x_TD.shape[1], batch.x_TD.dtype, batch.slots_TK.shape[1]).row_bytes


def sent_pairs(traffic: Traffic, **select) -> dict[tuple[int, int], int]:
    pairs = traffic.pairs(**select)
    return dict(
        zip(zip(pairs.sources.tolist(), pairs.targets.tolist(), strict=True), pairs.num_bytes.tolist(), strict=True)
    )


def reverse(pairs: dict[tuple[int, int], int], row: int, back: int) -> dict[tuple[int, int], int]:
    return {(target, source): num_bytes // row * back for (source, target), num_bytes in pairs.items()}


def count(pairs: list[tuple[int, int]], row: int) -> dict[tuple[int, int], int]:
    """Bytes per (source, target) of one row each; what stays on a rank is not sent."""
    found: dict[tuple[int, int], int] = {}
    for source, target in pairs:
        if source != target:
            found[source, target] = found.get((source, target), 0) + row
    return found


def two_hop_rows(case: Case) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(source, forwarder) of each row on the rail and (forwarder, owner) of each row in a node, token by token."""
    topology, rail, node = case.topology, [], []
    for source, batch in enumerate(case.batches):
        for ranks in case.ranks_of(batch):
            hit = set(ranks) - {-1}
            for n in {topology.node_of[rank] for rank in hit}:
                forwarder = topology.forwarder(source, n)
                rail.append((source, forwarder))
                node += [(forwarder, rank) for rank in hit if topology.node_of[rank] == n]
    return rail, node


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_two_hop_sends_one_copy_per_node_and_one_per_rank_of_it(name, dtype):
    case = routed(TOPOLOGIES[name], dtype=dtype)
    topology, row, back = case.topology, wire_bytes(case), HIDDEN * dtype.itemsize
    going, coming = traffic_of(case, "two_hop")
    rail, node = two_hop_rows(case)
    assert sent_pairs(going, hop="rail", kind="all_to_all") == count(rail, row)
    assert sent_pairs(going, hop="node", kind="all_to_all") == count(node, row)
    assert sent_pairs(coming, hop="rail") == reverse(count(rail, row), row, back)
    assert sent_pairs(coming, hop="node") == reverse(count(node, row), row, back)
    assert not sent_pairs(coming, kind="counts")
    for rank, batch in enumerate(case.batches):
        own = topology.node_of[rank]
        others = sum(len({topology.node_of[r] for r in ranks if r >= 0} - {own}) for ranks in case.ranks_of(batch))
        assert going.bytes_of(rank, "inter") == row * others
        ragged = not topology.is_uniform
        rail_peers = (topology.num_ranks if ragged else topology.num_nodes) - 1
        node_peers = len(topology.nodes[own]) - 1
        count_bytes = 4 * (1 + topology.max_local) * rail_peers + 4 * node_peers
        assert going.bytes_of(rank, kind="counts") == count_bytes
        assert going.messages_of(rank, kind="counts") == rail_peers + node_peers
    assert sum(sent_pairs(going, hop="rail", kind="all_to_all").values()) > 0 or topology.num_nodes == 1


@pytest.mark.parametrize(("nodes", "local"), [(8, 8), (2, 4), (3, 1)])
def test_messages_of_a_full_batch(nodes, local):
    """(N - 1) + (G - 1) payload messages each way, and as many counts; flat needs P - 1."""
    topology = EpTopology.uniform(nodes, local)
    size = topology.num_ranks
    case = make_case(topology, [8 * size] * size, slots_per_rank=1, num_experts=size, top_k=2, hidden_size=1)
    two_hop, flat = traffic_of(case, "two_hop"), traffic_of(case, "flat")
    for rank in range(size):
        assert [traffic.messages_of(rank) for traffic in two_hop] == [nodes - 1 + local - 1] * 2
        assert [traffic.messages_of(rank, kind="counts") for traffic in two_hop] == [nodes - 1 + local - 1, 0]
        assert [traffic.messages_of(rank) for traffic in flat] == [size - 1] * 2
        assert [traffic.messages_of(rank, kind="counts") for traffic in flat] == [size - 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_flat_sends_one_copy_per_rank_or_per_choice(name, dtype):
    case = routed(TOPOLOGIES[name], dtype=dtype)
    row, back = wire_bytes(case), HIDDEN * dtype.itemsize
    for dedup in (True, False):
        rows = [
            (source, rank)
            for source, batch in enumerate(case.batches)
            for ranks in case.ranks_of(batch)
            for rank in (set(ranks) if dedup else ranks)
            if rank >= 0
        ]
        going, coming = traffic_of(case, "flat", dedup=dedup)
        assert sent_pairs(going) == count(rows, row)
        assert sent_pairs(coming) == reverse(count(rows, row), row, back)
    for rank in range(case.topology.num_ranks):
        assert going.bytes_of(rank, kind="counts") == 4 * (case.topology.num_ranks - 1)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_exact_mode_returns_one_row_per_choice(name):
    case = routed(TOPOLOGIES[name])
    topology, row, back = case.topology, wire_bytes(case), 4 * HIDDEN
    choices = [
        (source, rank)
        for source, batch in enumerate(case.batches)
        for ranks in case.ranks_of(batch)
        for rank in ranks
        if rank >= 0
    ]
    inter = sum(topology.node_of[source] != topology.node_of[rank] for source, rank in choices)
    going, coming = traffic_of(case, "flat", exact=True)
    assert sent_pairs(coming) == reverse(count(choices, back), back, back)
    assert sent_pairs(going) == sent_pairs(traffic_of(case, "flat")[0])
    going, coming = traffic_of(case, "two_hop", exact=True)
    rail = [(source, topology.forwarder(source, topology.node_of[rank])) for source, rank in choices]
    node = [(topology.forwarder(source, topology.node_of[rank]), rank) for source, rank in choices]
    assert coming.total("inter") == back * inter
    assert sent_pairs(coming, hop="rail") == reverse(count(rail, back), back, back)
    assert sent_pairs(coming, hop="node") == reverse(count(node, back), back, back)
    assert sent_pairs(going, hop="rail", kind="all_to_all") == count(two_hop_rows(case)[0], row)
    if topology.is_uniform:
        # Counts of choices travel beside those of rows, so that nothing is read twice.
        rail_counts = 4 * (1 + 2 * topology.max_local) * (topology.num_nodes - 1)
        assert going.bytes_of(0, kind="counts") == rail_counts + 8 * (topology.max_local - 1)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_all_gather_sends_padded_rows_along_the_rail_first(name):
    case = routed(TOPOLOGIES[name])
    topology, rows = case.topology, case.padded_T
    going, coming = traffic_of(case, "allgather")
    exact = traffic_of(case, "allgather", exact=True)[1]
    for rank in range(topology.num_ranks):
        others, nodes = topology.num_ranks - 1, topology.num_nodes - 1
        assert going.messages_of(rank, kind="counts") == 0
        if topology.is_uniform:
            assert going.bytes_of(rank, "inter") == wire_bytes(case) * rows * nodes
            assert going.bytes_of(rank, "intra") == wire_bytes(case) * rows * (others - nodes)
            assert coming.bytes_of(rank, "inter") == 4 * HIDDEN * rows * nodes
            assert coming.bytes_of(rank, "intra") == 4 * HIDDEN * rows * (others - nodes)
        else:
            assert going.bytes_of(rank) == wire_bytes(case) * rows * others
            assert coming.bytes_of(rank) == 4 * HIDDEN * rows * others
        assert exact.bytes_of(rank) == coming.bytes_of(rank) * case.batches[0].slots_TK.shape[1]


def groups_hit(num_experts: int, top_k: int, groups: int) -> float:
    """E[distinct groups] of `top_k` distinct experts drawn evenly from equal groups."""
    size = num_experts // groups
    return groups * (1 - math.comb(num_experts - size, top_k) / math.comb(num_experts, top_k))


@pytest.mark.parametrize("num_nodes", [2, 4, 8])
def test_copies_that_cross_nodes_follow_the_formula(num_nodes, record_property):
    """256 experts, top 8, nodes of 8 ranks; within 2 %. Rows as bytes over row bytes, both directions."""
    topology = EpTopology.uniform(num_nodes, 8)
    size, num_tokens = topology.num_ranks, 4096
    case = make_case(topology, [num_tokens // size] * size, slots_per_rank=256 // size, num_experts=256, top_k=8)
    elsewhere = 1 - 1 / num_nodes
    expected = {
        "no dedup": 8 * elsewhere,
        "flat": groups_hit(256, 8, size) * elsewhere,
        "two_hop": groups_hit(256, 8, num_nodes) * elsewhere,
    }
    row, back = wire_bytes(case), 4 * case.batches[0].x_TD.shape[1]
    copies = {}
    for label in expected:
        kind = "flat" if label == "no dedup" else label
        going, coming = traffic_of(case, kind, dedup=label != "no dedup")
        copies[label] = going.total("inter") / row / num_tokens
        assert copies[label] == pytest.approx(expected[label], rel=0.02)
        assert coming.total("inter") / back == going.total("inter") / row
        title = "inter-node copies per token, 256 experts, top 8, nodes of 8 (counted / formula)"
        record_property("table", (title, f"{num_nodes} nodes", label, f"{copies[label]:.3f} / {expected[label]:.3f}"))
    if num_nodes == 2:
        # Both directions: copies are the same back, only the rows differ in size.
        assert copies["flat"] / copies["two_hop"] >= 3.2
        assert copies["no dedup"] / copies["two_hop"] >= 3.9


@pytest.mark.parametrize("num_experts", [64, 128, 256])
def test_a_hot_expert_does_not_load_one_nic(num_experts, record_property):
    """Zipf 1.0 over experts, 8 nodes of 8; each case is the mean of three placements."""
    topology = EpTopology.uniform(8, 8)
    skew = {"flat": [], "two_hop": []}
    for seed in range(3):
        shape = {"slots_per_rank": num_experts // 64, "num_experts": num_experts, "top_k": 8}
        case = make_case(topology, [64] * 64, **shape, zipf=1.0, seed=seed)
        for kind, found in skew.items():
            found.append(traffic_of(case, kind)[0].receive_skew())
    for kind, found in skew.items():
        title = "bytes received from other nodes, busiest NIC over mean, zipf 1.0, 64 ranks"
        record_property("table", (title, f"{num_experts} experts, top 8", kind, f"{np.mean(found):.2f}"))
    assert np.mean(skew["two_hop"]) <= 1.5
    assert np.mean(skew["flat"]) > 4


def test_one_layer_on_2048_virtual_ranks(record_property):
    topology = EpTopology.uniform(256, 8)
    case = make_case(topology, [2] * 2048, slots_per_rank=1, num_experts=2048, top_k=8)
    # Dispatchers are made once per membership, not per layer.
    exchanges = [whole_layer(case, "two_hop", rank) for rank in range(2048)]
    begin = time.process_time()
    results = simulate(topology, exchanges)
    took_s = time.process_time() - begin
    title = "simulated layer, 2,048 ranks in one process, 2 tokens each, CPU seconds"
    record_property("table", (title, "two_hop", "one layer", f"{took_s:.2f}"))
    assert took_s < 8
    some = range(0, 2048, 97)
    expected = local_layer(
        Case(EpTopology.uniform(1, len(some)), 1, case.physical_to_logical, [case.batches[r] for r in some]),
        exact=False,
    )
    for rank, out_TD in zip(some, expected, strict=True):
        torch.testing.assert_close(results[rank][1], out_TD, atol=1e-2, rtol=1e-5)
