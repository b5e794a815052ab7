"""The cost model against an event simulation of single messages. Runs in 1 s."""

import dataclasses
import heapq
import itertools

import numpy as np
import pytest

from phalanx.errors import ConfigError
from phalanx.parallel import calibration
from phalanx.parallel.cost_fit import Sample, calibrate
from phalanx.parallel.costmodel import (
    KINDS,
    ExpertTraffic,
    LogGP,
    choose,
    costs_from,
    expected_hits,
    fabric_of,
)
from phalanx.parallel.topology import EpTopology

MICRO = 1e-6
FAST = LogGP(
    o_x=1.5 * MICRO,
    o_i=0.7 * MICRO,
    L_x=12 * MICRO,
    L_i=6 * MICRO,
    beta_x=1 / 45e9,
    beta_i=1 / 300e9,
    t_p=8 * MICRO,
)
SLOW = LogGP(o_x=3e-4, o_i=2e-5, L_x=1e-3, L_i=1e-4, beta_x=1 / 25e6, beta_i=1 / 2e9, t_p=5e-5, beta_p=1 / 4e9)
DEEPSEEK = ExpertTraffic(num_experts=256, top_k=8, row_bytes=7456, return_bytes=14336, reduce_bytes=4 * 7168)
QWEN = ExpertTraffic.of(2048, 2, 128, 8, exact=False)
EXACT = ExpertTraffic.of(2048, 2, 128, 8, exact=True)


class Network:
    """Ranks that post all their messages (o each), then send them over a port per tier, first come first served.

    A rank serves the nodes, and the ranks in them, in the order that begins with its own place. Nobody then waits
    behind a message for another rank, as with TCP, which serves all connections in turns.
    """

    def __init__(self, constants: LogGP, topology: EpTopology) -> None:
        self.constants, self.topology = constants, topology
        self.ready = [0.0] * topology.num_ranks

    def pack(self, bytes_SX: np.ndarray, operations: int = 1) -> None:
        """Gather the rows that go to X places, the own rank or node included, or that came from there."""
        seconds = operations * self.constants.t_p + bytes_SX.sum(1) * self.constants.beta_p
        self.ready = list(np.add(self.ready, seconds))

    def staggered(self, rank: int) -> list[int]:
        nodes, here, place = self.topology.nodes, self.topology.node_of[rank], self.topology.local_of[rank]
        in_order = [nodes[(here + n) % len(nodes)] for n in range(len(nodes))]
        return [ranks[(place + g) % len(ranks)] for ranks in in_order for g in range(len(ranks))][1:]

    def exchange(self, bytes_SR: np.ndarray) -> None:
        """Every rank goes on when all that it sends and receives is through."""
        ranks, node_of, c = range(len(self.ready)), self.topology.node_of, self.constants
        peers = [[peer for peer in self.staggered(rank) if bytes_SR[rank][peer]] for rank in ranks]
        away = [[node_of[peer] != node_of[rank] for peer in peers[rank]] for rank in ranks]
        for rank in ranks:
            self.ready[rank] += sum(c.o_x if far else c.o_i for far in away[rank])
        queues = [
            (rank, far, [peer for peer, its in zip(peers[rank], away[rank], strict=True) if its == far])
            for rank in ranks
            for far in (False, True)
        ]
        # (time at which the port is free, tie break, rank, tier, peers still to be served)
        events = [(self.ready[rank], i, rank, far, queue) for i, (rank, far, queue) in enumerate(queues) if queue]
        heapq.heapify(events)
        free = {(rank, far): 0.0 for rank in ranks for far in (False, True)}
        done = list(self.ready)
        while events:
            now, i, rank, far, queue = heapq.heappop(events)
            peer, rest = queue[0], queue[1:]
            duration = bytes_SR[rank][peer] * (c.beta_x if far else c.beta_i)
            sent = now + duration
            arrived = max(sent + (c.L_x if far else c.L_i), free[peer, far] + duration)
            free[peer, far] = arrived
            done[rank], done[peer] = max(done[rank], sent), max(done[peer], arrived)
            if rest:
                heapq.heappush(events, (sent, i, rank, far, rest))
        self.ready = done


def hit_ranks(topology, num_tokens, traffic, rng, popularity):
    """(source, token, choice) -> rank of the expert."""
    keys = rng.gumbel(size=(topology.num_ranks, num_tokens, traffic.num_experts)) + np.log(popularity)
    experts = np.argsort(-keys, axis=2)[:, :, : traffic.top_k]
    return experts * topology.num_ranks // traffic.num_experts


def rows_to(places, num_places, once):
    """(source, place): rows, one per (token, place), or one per choice."""
    counts = np.stack([(places == place).sum(2) for place in range(num_places)], axis=2)
    return (np.minimum(counts, 1) if once else counts).sum(1)


def simulated_seconds(kind, constants, topology, num_tokens, traffic, rng, popularity):
    """One layer: counts, dispatch, combine. Returns seconds, and skew of what ranks and nodes receive from outside."""
    ranks, nodes = topology.num_ranks, topology.num_nodes
    local = topology.max_local
    ranks_STK = hit_ranks(topology, num_tokens, traffic, rng, popularity)
    nodes_STK = ranks_STK // local
    out_flat = rows_to(ranks_STK, ranks, True)
    back_flat = rows_to(ranks_STK, ranks, not traffic.exact)
    to_node = rows_to(nodes_STK, nodes, True)
    from_node = rows_to(nodes_STK, nodes, not traffic.exact)
    same_rail = np.arange(ranks)[:, None] % local == np.arange(ranks)[None] % local
    same_node = np.arange(ranks)[:, None] // local == np.arange(ranks)[None] // local

    def rail(rows_SN):
        return np.repeat(rows_SN, local, axis=1) * same_rail

    def inside(rows_SR):
        """What forwarders of equal local index hand on."""
        return np.concatenate([sum(np.split(rows_SR, nodes)) for _ in range(nodes)]) * same_node

    everybody = np.ones((ranks, ranks), dtype=int)
    network = Network(constants, topology)
    row, back = traffic.row_bytes, traffic.return_bytes
    if kind == "flat":
        network.exchange(4 * everybody)
        network.pack(out_flat * row)
        network.exchange(out_flat * row)
        network.exchange(back_flat.T * back)
        network.pack(back_flat * back)
    elif kind == "two_hop":
        network.exchange(4 * (1 + local) * same_rail)
        network.exchange(4 * same_node)
        network.pack(to_node * row)
        network.exchange(rail(to_node) * row)
        network.pack(inside(out_flat) * row)
        network.exchange(inside(out_flat) * row)
        network.exchange(inside(back_flat).T * back)
        network.pack(inside(back_flat) * back)
        network.exchange(rail(from_node).T * back)
        network.pack(from_node * back)
    else:
        for row_bytes, hops in ((row, (1, nodes)), (traffic.reduce_bytes, (nodes, 1))):
            for gathered in hops:
                pattern = same_rail if gathered == 1 else same_node
                network.pack(pattern * gathered * num_tokens * row_bytes, operations=0)
                network.exchange(pattern * gathered * num_tokens * row_bytes)
    off_node = out_flat * ~same_node
    received = off_node.sum(0), (rail(to_node) * ~same_node).sum(0)
    skews = [float(bytes_R.max() / bytes_R.mean()) if bytes_R.any() else 1.0 for bytes_R in received]
    return max(network.ready), skews


def samples_of(constants, topology, noise, rng):
    """What `collect` would measure there: each rank sends to its next peers of a tier."""
    samples = [Sample("pack", 1, size, constants.t_p + size * constants.beta_p) for size in (2048, 1 << 21)]
    for case in itertools.chain.from_iterable(calibration._cases(topology)):
        bytes_SR = np.zeros((topology.num_ranks, topology.num_ranks))
        for rank in range(topology.num_ranks):
            members = calibration.peers(topology, rank, case.hop)
            bytes_SR[rank, calibration._targets(topology, members, rank, case)] = case.size
        network = Network(constants, topology)
        network.exchange(bytes_SR)
        seconds = max(network.ready) * (1 + noise * rng.standard_normal())
        samples.append(Sample(case.tier, case.num_messages, case.num_messages * case.size, seconds))
    return samples


@pytest.mark.parametrize("constants", [FAST, SLOW], ids=["fast", "slow"])
def test_calibrated_predictions_on_cases_never_timed(constants, record_property):
    """Calibrated on noisy samples of one topology, and asked about others."""
    rng = np.random.default_rng(7)
    fitted = calibrate(samples_of(constants, EpTopology.uniform(3, 4), 0.03, rng))
    errors = {}
    for shape, num_tokens, traffic in itertools.product(((2, 4), (4, 2), (2, 8)), (32, 512), (QWEN, EXACT)):
        topology = EpTopology.uniform(*shape)
        even = np.ones(traffic.num_experts)
        for kind in KINDS:
            truth, _ = simulated_seconds(kind, constants, topology, num_tokens, traffic, rng, even)
            predicted = fitted.predict(kind, topology, num_tokens, traffic)
            errors[shape, num_tokens, traffic.exact, kind] = predicted / truth - 1
    worst = max(errors, key=lambda case: abs(errors[case]))
    name = f"{'fast' if constants is FAST else 'slow'} network, {len(errors)} cases"
    record_property("table", ("cost model", name, "worst error", f"{errors[worst]:+.1%}"))
    assert abs(errors[worst]) <= 0.15, (worst, errors)


def test_skew_is_what_makes_the_busiest_rank_slow():
    topology = EpTopology.uniform(4, 4)
    rng = np.random.default_rng(3)
    popularity = np.ones(QWEN.num_experts)
    popularity[:8] = 4.0  # all experts of rank 0
    truth, (skew, _) = simulated_seconds("flat", SLOW, topology, 256, QWEN, rng, popularity)
    assert skew > 1.5
    # The busiest receiver of the dispatch is the busiest sender of the combine, so the factor holds for both.
    assert SLOW.predict("flat", topology, 256, QWEN, skew=skew) == pytest.approx(truth, rel=0.15)
    assert SLOW.predict("flat", topology, 256, QWEN) < 0.75 * truth


def test_fitted_constants_are_those_of_the_network():
    rng = np.random.default_rng(1)
    exact = calibrate(samples_of(SLOW, EpTopology.uniform(3, 4), 0.0, rng))
    # Inside nodes all exchanges have G - 1 messages, and o_i cannot be told from L_i.
    expected = dataclasses.replace(SLOW, o_i=0.0, L_i=SLOW.L_i + 3 * SLOW.o_i)
    assert fabric_of(exact) == pytest.approx(fabric_of(expected), rel=0.05)


def test_fit_is_never_negative_and_needs_samples():
    falling = [Sample("inter", 1, size, 1e-3 - size * 1e-9) for size in (1, 1000, 100000)]
    fitted = calibrate(falling)
    assert min(fabric_of(fitted)) >= 0
    assert fitted.beta_x == 0
    assert fitted.o_x == 0
    assert fitted.L_x == pytest.approx(1e-3, rel=0.1)
    assert (fitted.o_i, fitted.L_i, fitted.beta_i) == (fitted.o_x, fitted.L_x, fitted.beta_x)
    with pytest.raises(ConfigError, match="no exchange between ranks was timed"):
        calibrate([Sample("pack", 0, 1, 1.0)])


@pytest.mark.parametrize(
    ("groups", "experts", "top_k", "expected"),
    [(16, 256, 8, 6.52), (2, 256, 8, 1.99), (8, 256, 8, 5.29), (64, 256, 8, 7.68), (4, 128, 8, 3.63), (8, 8, 2, 2.0)],
)
def test_expected_hits_of_the_published_shapes(groups, experts, top_k, expected):
    assert expected_hits(groups, experts, top_k) == pytest.approx(expected, abs=0.006)


def test_expected_hits_against_draws():
    rng = np.random.default_rng(0)
    drawn = [len(set(rng.permutation(48)[:5] // 8)) for _ in range(20000)]
    assert expected_hits(6, 48, 5) == pytest.approx(np.mean(drawn), rel=0.01)
    # Replicas: more ranks than experts.
    assert expected_hits(16, 8, 2) == pytest.approx(2.0, rel=0.15)


@pytest.mark.parametrize(
    ("shape", "num_tokens", "flat", "two_hop"),
    [((2, 8), 16, 46, 46), ((2, 8), 128, 106, 82), ((2, 8), 4096, 2241, 1375), ((8, 8), 4096, 4647, 3958)],
)
def test_dispatch_as_in_the_design(shape, num_tokens, flat, two_hop):
    """Microseconds of moe.md section 6, whose figures count what a rank keeps as sent."""
    topology = EpTopology.uniform(*shape)
    for kind, expected in (("flat", flat), ("two_hop", two_hop)):
        seconds = FAST.predict(kind, topology, num_tokens, DEEPSEEK, phase="dispatch")
        assert seconds * 1e6 == pytest.approx(expected, rel=0.08)


def test_choice_follows_size_and_network():
    nodes, alone = EpTopology.uniform(8, 8), EpTopology.uniform(1, 8)
    assert choose(FAST, EpTopology.uniform(2, 8), 16, DEEPSEEK) == "allgather"
    assert choose(FAST, nodes, 4096, DEEPSEEK) == "two_hop"
    # One node: the second hop is the same as the first, with more packing.
    assert choose(FAST, alone, 4096, DEEPSEEK) == "flat"
    assert choose(FAST, nodes, 4096, DEEPSEEK, kinds=("flat", "allgather")) == "flat"
    costs = costs_from(fabric_of(FAST), DEEPSEEK)(128, nodes)
    assert min(costs, key=costs.__getitem__) == choose(FAST, nodes, 128, DEEPSEEK)
    assert choose(FAST, nodes, 512, DEEPSEEK, rail_skew=4.0) != "two_hop"
    with pytest.raises(ConfigError, match="3 network constants, not the 8 o_x"):
        costs_from([1.0, 2.0, 3.0], DEEPSEEK)


def test_phases_add_up():
    topology = EpTopology.uniform(2, 4)
    for kind in KINDS:
        parts = [FAST.predict(kind, topology, 64, EXACT, phase=phase) for phase in ("counts", "dispatch", "combine")]
        assert FAST.predict(kind, topology, 64, EXACT) == pytest.approx(sum(parts))
    reduced = dataclasses.replace(EXACT, exact=False)
    assert FAST.predict("two_hop", topology, 4096, EXACT) > FAST.predict("two_hop", topology, 4096, reduced)
