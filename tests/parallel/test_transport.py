"""Exchanges: simulated against payloads that a receiver can check, gloo against simulated, and what is counted. 3 s."""

import time

import numpy as np
import pytest
import torch

from phalanx.parallel.rendezvous import host_store
from phalanx.parallel.sim_transport import simulate
from phalanx.parallel.topology import EpTopology
from phalanx.parallel.traffic import CountingTransport, Traffic
from phalanx.parallel.transport import AllGather, AllToAll, Counts, ReduceScatter, peers, run
from tests.parallel import ep_programs
from tests.parallel.ep_programs import DTYPES, HOPS, payload, rows_between
from tests.support.ranks import run_ranks

TOPOLOGIES = {
    "one rank": EpTopology.uniform(1, 1),
    "one node": EpTopology.uniform(1, 4),
    "nodes of one": EpTopology.uniform(3, 1),
    "2x2": EpTopology.uniform(2, 2),
    "3x4": EpTopology.uniform(3, 4),
    "3+1": EpTopology(((0, 1, 2), (3,))),
    "6+3": EpTopology(((0, 1, 2, 3, 4, 5), (6, 7, 8))),
    "interleaved": EpTopology(((0, 2), (1, 3))),
}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_simulated_rows_arrive_where_they_belong(name):
    topology = TOPOLOGIES[name]
    ranks = range(topology.num_ranks)
    for rank, results in enumerate(simulate(topology, [ep_programs.all_requests(topology, rank) for rank in ranks])):
        result = iter(results)
        for hop in HOPS:
            members = peers(topology, rank, hop)
            for dtype in DTYPES:
                expected = torch.cat([payload(peer, rank, hop, dtype) for peer in members])
                assert torch.equal(next(result), expected.float())
            assert next(result).shape == (0, 16)
            assert next(result).tolist() == [[peer, rank, len(hop)] for peer in members]
            for num_rows in (2, 0):
                everybody = torch.tensor(members).repeat_interleave(num_rows).view(-1, 1).expand(-1, 3)
                assert torch.equal(next(result), everybody.float())
                for _ in range(2):
                    assert torch.equal(
                        next(result), torch.full((num_rows, 3), sum(members) + rank * len(members) * 1.0)
                    )
        assert not list(result)


@pytest.mark.multi
def test_gloo_gives_what_the_simulation_gives():
    """Also that what each real rank counts adds up to what the simulation counts."""
    topologies = [TOPOLOGIES[name] for name in ("one node", "nodes of one", "2x2", "3+1", "interleaved")]
    store, address = host_store()
    on_ranks = run_ranks(4, ep_programs.exchange_everything, address, topologies)
    del store
    results = [iter(results) for results in on_ranks]
    for topology in topologies:
        counted = Traffic(topology)
        ranks = range(topology.num_ranks)
        simulated = simulate(topology, [ep_programs.all_requests(topology, rank) for rank in ranks], record=counted)
        pairs = counted.pairs()
        for rank in ranks:
            for ours, expected in zip(next(results[rank]), simulated[rank], strict=True):
                assert torch.equal(ours, expected)
            mine = pairs.sources == rank
            for ours, values in zip(next(results[rank]), pairs, strict=True):
                assert ours.tolist() == values[mine].tolist()


def one_request(*requests):
    """One generator per request, to be simulated together."""

    def exchange(request):
        return (yield request)

    return [exchange(request) for request in requests]


def all_to_all(send, receive, hop="flat", dtype=torch.float32):
    return AllToAll(hop, torch.zeros(sum(send), 2, dtype=dtype), send, receive)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        (
            [all_to_all((1, 2), (1, 0)), all_to_all((1, 0), (2, 0))],
            "rank 1 sends 1 rows to rank 0, which expects 0",
        ),
        (
            [all_to_all((0, 0), (0, 0)), Counts("flat", torch.zeros(2, 1, dtype=torch.int32))],
            r"rank 0 asks for AllToAll\('flat', .*, rank 1 for Counts",
        ),
        (
            [all_to_all((0, 0), (0, 0)), all_to_all((0, 0), (0, 0), hop="node")],
            r"rank 0 asks for AllToAll\('flat', .*, rank 1 for AllToAll\('node'",
        ),
        (
            [all_to_all((0, 0), (0, 0)), all_to_all((0, 0), (0, 0), dtype=torch.int32)],
            r"rank 0 asks for .*torch.float32 \(0, 2\).*, rank 1 for .*torch.int32",
        ),
        (
            [AllGather("flat", torch.zeros(2, 1)), AllGather("flat", torch.zeros(3, 1))],
            r"rank 0 asks for AllGather.*\(2, 1\).*, rank 1 for AllGather.*\(3, 1\)",
        ),
        ([all_to_all((0, 0, 0), (0, 0)), all_to_all((0, 0), (0, 0))], r"rank 0 has \(3, 2\) splits for 2 peers"),
        (
            [Counts("flat", torch.zeros(2, 1)), Counts("flat", torch.zeros(2, 1))],
            "counts in torch.float32, not in int32",
        ),
    ],
)
def test_a_mismatch_names_the_ranks(requests, message):
    with pytest.raises(AssertionError, match=message):
        simulate(EpTopology.uniform(1, 2), one_request(*requests))


def test_a_rank_that_ends_early_is_named():
    def nothing():
        return None
        yield

    ask = one_request(AllGather("flat", torch.zeros(1)))
    with pytest.raises(AssertionError, match=r"rank 1 has ended while rank 0 asks for AllGather\('flat'"):
        simulate(EpTopology.uniform(1, 2), [*ask, nothing()])


def test_an_all_gather_is_not_shared_between_ranks():
    first, second = simulate(EpTopology.uniform(1, 2), one_request(*[AllGather("flat", torch.zeros(1))] * 2))
    first += 1
    assert second.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["3x4", "6+3", "interleaved"])
def test_traffic_of_all_to_all_is_what_was_asked(name):
    """Against sums over all pairs, one by one."""
    topology = TOPOLOGIES[name]
    ranks = range(topology.num_ranks)
    traffic = Traffic(topology)
    simulate(topology, [ep_programs.all_requests(topology, rank) for rank in ranks], record=traffic)
    row_bytes = sum(5 * torch.empty(0, dtype=dtype).element_size() for dtype in DTYPES)
    node_bytes = np.zeros((topology.num_nodes, topology.num_nodes), dtype=int)
    received = np.zeros(topology.num_ranks)
    messages = dict.fromkeys(ranks, 0)
    for source in ranks:
        for target in ranks:
            rows = rows_between(source, target, "flat") if source != target else 0
            link = topology.node_of[source], topology.node_of[target]
            node_bytes[link] += rows * row_bytes
            received[target] += rows * row_bytes * (link[0] != link[1])
            messages[source] += len(DTYPES) * (rows > 0)
    asked = {"hop": "flat", "kind": "all_to_all"}
    assert (traffic.node_bytes(**asked) == node_bytes).all()
    assert [traffic.messages_of(rank, **asked) for rank in ranks] == list(messages.values())
    assert traffic.total("inter", **asked) == node_bytes.sum() - node_bytes.trace()
    assert traffic.total(**asked) == sum(traffic.bytes_of(rank, **asked) for rank in ranks)
    assert traffic.bytes_of(0, "inter", **asked) + traffic.bytes_of(0, "intra", **asked) == traffic.bytes_of(0, **asked)
    assert traffic.receive_skew(**asked) == pytest.approx(received.max() / received.mean())
    # Counts are never empty, and 3 int32 each; they are not payload.
    others = topology.num_ranks - 1
    assert traffic.messages_of(1, hop="flat", kind="counts") == others
    assert traffic.bytes_of(1, hop="flat", kind="counts") == 12 * others
    payload_alone = sum(traffic.total(kind=kind) for kind in ("all_to_all", "all_gather", "reduce_scatter"))
    assert traffic.total() == payload_alone


def test_two_thousand_ranks_are_quick_to_simulate(record_property):
    """256 nodes of 8 ranks, the pattern of a layer's two hops both ways."""

    def exchange(rank):
        rail, node = len(peers(topology, rank, "rail")), len(peers(topology, rank, "node"))
        yield Counts("rail", torch.zeros(rail, 9, dtype=torch.int32))
        yield Counts("node", torch.zeros(node, 1, dtype=torch.int32))
        rows = torch.full((rail, 16), rank % 100, dtype=torch.uint8)
        rows = yield AllToAll("rail", rows, (1,) * rail, (1,) * rail)
        rows = yield AllToAll("node", rows, (rail // node,) * node, (rail // node,) * node)
        rows = yield AllToAll("node", rows, (rail // node,) * node, (rail // node,) * node)
        return (yield AllToAll("rail", rows, (1,) * rail, (1,) * rail))

    topology = EpTopology.uniform(256, 8)
    begin = time.process_time()
    results = simulate(topology, [exchange(rank) for rank in range(topology.num_ranks)])
    seconds = time.process_time() - begin
    record_property("table", ("simulation", "2,048 ranks, one layer, two hops", "CPU seconds", f"{seconds:.2f}"))
    assert all((rows == rank % 100).all() for rank, rows in enumerate(results))
    assert seconds < 2.0


def test_traffic_stays_small_and_adds_up():
    topology = EpTopology.uniform(1, 2)
    whole, part = Traffic(topology), Traffic(topology)
    request = AllGather("flat", torch.zeros(3, 2))
    for _ in range(5000):
        part.sent(0, request)
    part.sent(1, ReduceScatter("flat", torch.zeros(4, 2)))
    whole.add(part)
    whole.add(part)
    assert whole.bytes_of(0) == 2 * 5000 * 24
    assert whole.messages_of(0) == 2 * 5000
    assert whole.bytes_of(1) == 2 * 16
    assert whole.receive_skew() == 1.0
    assert len(whole.pairs().sources) == 2
    whole.clear()
    assert whole.total() == 0


def test_meanwhile_runs_once_beside_the_first_payload():
    class Alone:
        rank, topology = 0, EpTopology.uniform(1, 1)

        def start(self, request):
            seen.append(type(request).__name__)
            return self

        def wait(self):
            return torch.zeros(1, 1)

    def exchange():
        yield Counts("flat", torch.zeros(1, 1, dtype=torch.int32))
        yield all_to_all((0,), (0,))
        yield all_to_all((0,), (0,))

    seen: list[str] = []
    traffic = Traffic(Alone.topology)
    run(exchange(), CountingTransport(Alone(), traffic), lambda: seen.append("meanwhile"))
    assert seen == ["Counts", "AllToAll", "meanwhile", "AllToAll"]
    assert traffic.total() == 0
