"""Every dispatcher gives what `local` gives, on virtual ranks: any topology, placement and batch. Runs in 18 s."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.errors import ConfigError
from phalanx.moe.dispatch.dispatcher import DispatchConfig
from phalanx.moe.dispatch.flat import FlatDispatcher
from phalanx.moe.wire import RowLayout
from phalanx.parallel.sim_transport import simulate
from phalanx.parallel.topology import EpTopology
from phalanx.parallel.transport import AllGather, AllToAll, Counts, ReduceScatter
from phalanx.plugins import names
from tests.moe.dispatching import (
    ALONE,
    Batch,
    Case,
    expected_rows,
    experts,
    layer,
    local_layer,
    make_case,
    simulate_layer,
    whole_layer,
)

PROPERTY = settings(deadline=None, derandomize=True, max_examples=150)
KINDS = ("allgather", "flat", "two_hop")
RAGGED = EpTopology(((0, 1, 2), (3,), (4, 5)))


@st.composite
def topologies(draw):
    sizes = draw(st.one_of(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sampled_from([[2] * 3, [3] * 2])))
    ranks = draw(st.permutations(range(sum(sizes)))) if draw(st.booleans()) else list(range(sum(sizes)))
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    return EpTopology(tuple(tuple(sorted(ranks[end - size : end])) for size, end in zip(sizes, ends, strict=True)))


@st.composite
def cases(draw):
    topology = draw(topologies())
    slots_per_rank = draw(st.integers(1, 4))
    num_slots = slots_per_rank * topology.num_ranks
    num_experts = draw(st.integers(1, num_slots))
    most = draw(st.sampled_from([0, 1, 3, 9]))
    return make_case(
        topology,
        [draw(st.integers(0, most)) for _ in range(topology.num_ranks)],
        slots_per_rank=slots_per_rank,
        num_experts=num_experts,
        top_k=draw(st.integers(1, min(4, num_experts))),
        hidden_size=draw(st.sampled_from([1, 3, 8, 20])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        drop=draw(st.sampled_from([0.0, 0.3, 1.0])),
        hot=draw(st.sampled_from([False, False, False, True])),
        seed=draw(st.integers(0, 2**20)),
    )


def assert_same(outputs, expected, exact):
    for (_, out_TD), expected_TD in zip(outputs, expected, strict=True):
        assert out_TD.dtype == expected_TD.dtype
        assert out_TD.shape == expected_TD.shape
        if exact:
            # Values, not bit patterns: a sum with zeros makes +0.0 of -0.0.
            assert torch.equal(out_TD, expected_TD)
        elif out_TD.dtype == torch.float32:
            torch.testing.assert_close(out_TD, expected_TD, atol=1e-4, rtol=1e-5)
        else:
            # Up to four partial sums, each rounded to bf16 (2**-9 of its size), may cancel.
            torch.testing.assert_close(out_TD, expected_TD, atol=1.0, rtol=2e-2)


@PROPERTY
@given(cases())
def test_every_kind_gives_what_local_gives(case):
    for exact in (False, True):
        expected = local_layer(case, exact=exact)
        for kind in KINDS:
            assert_same(simulate_layer(case, kind, exact=exact), expected, exact)
    assert_same(simulate_layer(case, "flat", dedup=False), local_layer(case, exact=False), False)


@PROPERTY
@given(cases())
def test_received_rows_are_the_tokens_routed_here_in_source_order(case):
    for kind in KINDS:
        for rank, (rows, _) in enumerate(simulate_layer(case, kind)):
            expected = expected_rows(case, kind, rank)
            for ours, theirs in zip(rows[:3], expected[:3], strict=True):
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours, theirs)


@PROPERTY
@given(cases())
def test_every_rank_makes_the_same_requests_whatever_its_batch(case):
    gathers = ["rail", "node"] if case.topology.is_uniform else ["flat"]
    sizes = {"rail": case.topology.num_nodes, "node": case.topology.max_local, "flat": 2}
    gathers = [hop for hop in gathers if sizes[hop] > 1]
    expected = {
        "local": [],
        "flat": [(Counts, "flat"), (AllToAll, "flat"), (AllToAll, "flat")],
        "allgather": [(AllGather, hop) for hop in gathers] + [(ReduceScatter, hop) for hop in reversed(gathers)],
        "two_hop": [(Counts, "rail"), (Counts, "node")] + [(AllToAll, h) for h in ("rail", "node", "node", "rail")],
    }

    def watched(exchange, seen):
        try:
            request = next(exchange)
            while True:
                seen.append((type(request), request.hop))
                request = exchange.send((yield request))
        except StopIteration as stop:
            return stop.value

    for kind in KINDS:
        for exact in (False, True):
            seen = [[] for _ in case.batches]
            exchanges = [whole_layer(case, kind, rank, exact=exact) for rank in range(len(seen))]
            simulate(case.topology, [watched(exchange, s) for exchange, s in zip(exchanges, seen, strict=True)])
            assert seen == [expected[kind]] * len(seen)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_local_is_the_weighted_sum(dtype, exact):
    """Against fp64, choice by choice."""
    case = make_case(ALONE, [40], slots_per_rank=8, num_experts=8, top_k=3, hidden_size=6, dtype=dtype, drop=0.2)
    batch = case.batches[0]
    [(rows, out_TD)] = simulate(ALONE, [whole_layer(case, "local", 0, exact=exact)])
    assert not rows.weights_RK[batch.ids_TK < 0].any()
    expected_TD = torch.zeros(out_TD.shape, dtype=torch.float64)
    for token, (ids, weights) in enumerate(zip(batch.ids_TK.tolist(), batch.weights_TK.double(), strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            if expert >= 0:
                y_D = (batch.x_TD[token].float() * torch.tensor((expert + 1) / 7)).to(dtype)
                expected_TD[token] += weight * y_D.double()
    assert out_TD.dtype == dtype
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(out_TD.double(), expected_TD, atol=100 * unit * 1e-2, rtol=2 * unit)


@pytest.mark.parametrize("topology", [EpTopology.uniform(2, 3), RAGGED], ids=["2x3", "3+1+2"])
def test_exact_bits_do_not_depend_on_the_placement(topology):
    """The same tokens under other placements and replica choices, on any kind."""
    first = make_case(topology, [5] * 6, slots_per_rank=4, num_experts=9, top_k=4, hidden_size=33, dtype=torch.bfloat16)
    [expected] = [local_layer(first, exact=True)]
    for seed in range(1, 6):
        other = make_case(
            topology, [5] * 6, slots_per_rank=4, num_experts=9, top_k=4, hidden_size=33, dtype=torch.bfloat16, seed=seed
        )
        batches = []
        for rank, batch in enumerate(first.batches):
            holders = [(other.physical_to_logical == expert).nonzero()[:, 0].tolist() for expert in range(9)]
            slots = [
                [holders[e][(t + seed + rank) % len(holders[e])] for e in row] for t, row in enumerate(batch.ids_TK)
            ]
            batches.append(batch._replace(slots_TK=torch.tensor(slots, dtype=torch.int32)))
        moved = Case(topology, 4, other.physical_to_logical, batches)
        for kind in KINDS:
            assert_same(simulate_layer(moved, kind, exact=True), expected, True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_row_stays_with_its_token(kind):
    """NaN and infinity of one token reach no other token, and none that goes nowhere."""
    case = make_case(EpTopology.uniform(2, 2), [6] * 4, slots_per_rank=2, num_experts=8, top_k=2, drop=0.3, seed=3)
    clean = [out_TD for _, out_TD in simulate_layer(case, kind)]
    victim = int((case.batches[1].ids_TK >= 0).any(1).nonzero()[0])
    case.batches[1].x_TD[victim] = torch.tensor([math.nan, math.inf, -math.inf, math.nan])
    for rank, (_, out_TD) in enumerate(simulate_layer(case, kind)):
        for token in range(6):
            if (rank, token) != (1, victim):
                assert torch.equal(out_TD[token], clean[rank][token])
            else:
                assert not out_TD[token].isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_not_changed(kind):
    case = make_case(EpTopology.uniform(2, 2), [5, 0, 2, 3], slots_per_rank=2, num_experts=6, top_k=3, drop=0.3)
    before = [Batch(*(part.clone() for part in batch)) for batch in case.batches]
    for exact in (False, True):
        simulate_layer(case, kind, exact=exact)
    for batch, copy in zip(case.batches, before, strict=True):
        assert all(torch.equal(part, other) for part, other in zip(batch, copy, strict=True))


@pytest.mark.parametrize("kind", names("moe/dispatch", ("DISPATCHER",)))
def test_steps_may_follow_each_other_on_one_dispatcher(kind):
    """A handle belongs to its dispatch: the second dispatch does not disturb the first one's combine."""
    topology = ALONE if kind == "local" else EpTopology.uniform(2, 2)
    size = topology.num_ranks
    shape = {"slots_per_rank": 8 // size, "num_experts": 8, "top_k": 3}
    one, two = (make_case(topology, [4] * size, **shape, seed=seed) for seed in (1, 2))

    def both(rank):
        dispatcher, dispatching = layer(one, kind, rank)
        first = yield from dispatching
        batch = two.batches[rank]
        slots_TK = batch.ids_TK if kind == "local" else batch.slots_TK
        second = yield from dispatcher.dispatch(batch.x_TD, slots_TK, batch.weights_TK, 4)
        out_two = yield from dispatcher.combine(experts(two, kind, rank, second, False), second.handle)
        out_one = yield from dispatcher.combine(experts(one, kind, rank, first, False), first.handle)
        return out_one, out_two

    results = simulate(topology, [both(rank) for rank in range(size)])
    for case, outputs in zip((one, two), zip(*results, strict=True), strict=True):
        for ours, expected in zip(outputs, local_layer(case, exact=False), strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("hidden_size", "dtype", "top_k", "row_bytes"),
    [
        (7168, torch.bfloat16, 8, 14400),
        (512, torch.float32, 4, 2080),
        (5, torch.bfloat16, 1, 32),
        (1, torch.float16, 3, 32),
    ],
)
def test_a_wire_row_keeps_everything(hidden_size, dtype, top_k, row_bytes):
    layout = RowLayout(hidden_size, dtype, top_k)
    assert layout.row_bytes == row_bytes
    x_TD = torch.randn(3, 2 * hidden_size)[:, :hidden_size].to(dtype)
    slots_TK = torch.randint(-1, 9, (3, top_k), dtype=torch.int32)
    weights_TK = torch.rand(3, top_k)
    packed = layout.pack(x_TD, slots_TK, weights_TK)
    assert packed.shape == (3, row_bytes)
    assert packed.dtype == torch.uint8
    for ours, expected in zip(layout.views(packed), (x_TD, slots_TK, weights_TK), strict=True):
        assert torch.equal(ours, expected)
    with pytest.raises(AssertionError, match="do not make RowLayout"):
        layout.pack(x_TD, slots_TK.long(), weights_TK)


def test_refusals():
    shape = {"slots_per_rank": 1, "top_k": 1, "hidden_size": 4, "dtype": torch.float32}
    with pytest.raises(ConfigError, match=r"exact mode does not go with dedup = False"):
        FlatDispatcher(DispatchConfig(topology=ALONE, rank=0, exact=True, dedup=False, **shape))
    case = make_case(EpTopology.uniform(1, 2), [2, 3], slots_per_rank=1, num_experts=2, top_k=1)
    dispatcher, _ = layer(case, "allgather", 1)
    batch = case.batches[1]
    with pytest.raises(AssertionError, match="3 tokens, padded_T is 2"):
        next(dispatcher.dispatch(batch.x_TD, batch.slots_TK, batch.weights_TK, 2))
