"""Dispatchers on real gloo ranks: results of `local`, bytes of the simulation. Runs in 10 s."""

import pytest
import torch

from phalanx.parallel.rendezvous import host_store
from phalanx.parallel.sim_transport import simulate
from phalanx.parallel.traffic import Traffic
from tests.moe import dispatch_ranks
from tests.moe.dispatch_ranks import RUNS
from tests.moe.dispatching import local_layer, whole_layer
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.multi


@pytest.mark.parametrize("size", [2, 4, 8])
def test_real_ranks_give_local_results_and_simulated_bytes(size, record_property):
    store, address = host_store()
    on_ranks = [iter(results) for results in run_ranks(size, dispatch_ranks.layers, address, size, timeout_s=100)]
    del store
    inter = {}
    for case in dispatch_ranks.cases(size):
        expected = {exact: local_layer(case, exact=exact) for exact in (False, True)}
        for kind, exact, dedup in RUNS:
            simulated, real = Traffic(case.topology), 0
            ranks = range(size)
            simulate(
                case.topology,
                [whole_layer(case, kind, rank, exact=exact, dedup=dedup) for rank in ranks],
                record=simulated,
            )
            pairs = simulated.pairs()
            for rank in ranks:
                out_TD, sources, targets, num_bytes, num_messages = next(on_ranks[rank])
                assert_same(out_TD, expected[exact][rank], exact)
                for ours, theirs in zip((sources, targets, num_bytes, num_messages), pairs, strict=True):
                    assert ours.tolist() == theirs[pairs.sources == rank].tolist()
                node_of = torch.tensor(case.topology.node_of)
                real += int(num_bytes[node_of[sources] != node_of[targets]].sum())
            inter[kind, exact, dedup] = real
    if size == 8:
        # The last case: 2 nodes of 4, 256 experts, top 8; dispatch and combine together.
        flat, two_hop, every = (inter[key] for key in (("flat", False, True), ("two_hop", False, True), RUNS[0]))
        assert flat / two_hop >= 2.6
        assert every / two_hop >= 3.9
        for label, value in (("flat, no dedup", every), ("flat", flat), ("two_hop", two_hop)):
            title = "inter-node bytes of 8 gloo ranks as 2 x 4, 256 experts, top 8 (ratio to two_hop)"
            record_property("table", (title, label, "bytes", f"{value} ({value / two_hop:.2f})"))


def assert_same(ours, expected, exact):
    if exact:
        assert torch.equal(ours, expected.float())
    elif expected.dtype == torch.float32:
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-5)
    else:
        # Partial sums are rounded to bf16 and may cancel.
        torch.testing.assert_close(ours, expected.float(), atol=1.0, rtol=2e-2)
