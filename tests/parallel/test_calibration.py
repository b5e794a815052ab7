"""Calibration: curves through whole layers, constants measured on live ranks. Runs in 5 s."""

import pytest

from phalanx.errors import ConfigError
from phalanx.parallel.cost_fit import LayerSample, curves_of
from phalanx.parallel.costmodel import KINDS, Layer, costs_from, fabric_of, on_curve
from phalanx.parallel.rendezvous import host_store
from phalanx.parallel.topology import EpTopology
from tests.parallel import ep_programs
from tests.parallel.test_costmodel import FAST, QWEN
from tests.support.ranks import run_ranks


def test_what_single_exchanges_do_not_show_comes_from_layers():
    """A network on which kinds take longer than their exchanges, each in its own way."""
    topology, traffic = EpTopology.uniform(2, 4), QWEN
    slower = {"flat": 1.0, "two_hop": 1.5, "allgather": 3.0}
    samples = [
        LayerSample(kind, topology, size, traffic, slower[kind] * FAST.predict(kind, topology, size, traffic))
        for size in (64, 1, 512)
        for kind in KINDS
    ]
    fabric = fabric_of(FAST, curves_of(FAST, samples))
    for num_tokens in (0, 1, 20, 64, 100, 512, 4096):
        for kind, seconds in costs_from(fabric, traffic)(num_tokens, topology).items():
            expected = slower[kind] * FAST.predict(kind, topology, num_tokens, traffic)
            assert seconds == pytest.approx(expected, rel=1e-6), (kind, num_tokens)
    with pytest.raises(ConfigError, match="25 network constants"):
        costs_from(fabric[:-1], traffic)


def test_a_curve_between_and_beyond_its_layers():
    curve = [Layer(1.0, 2.0), Layer(3.0, 3.0), Layer(4.0, 8.0)]
    found = [on_curve(seconds, curve) for seconds in (0.0, 0.5, 1.0, 2.0, 3.0, 3.5, 4.0, 6.0)]
    assert found == [0.0, 1.0, 2.0, 2.5, 3.0, 5.5, 8.0, 12.0]
    assert on_curve(5.0, []) == 5.0


@pytest.mark.multi
@pytest.mark.parametrize("topology", [EpTopology.uniform(2, 2), EpTopology(((0, 1), (2,)))], ids=["2x2", "2+1"])
def test_measured_constants_are_equal_on_all_ranks(topology, record_property):
    store, address = host_store()
    results = run_ranks(topology.num_ranks, ep_programs.calibrate_live, address, topology)
    del store
    fabrics = [fabric for fabric, _ in results]
    assert all(fabric == fabrics[0] for fabric in fabrics)
    assert min(fabrics[0]) >= 0
    assert max(fabrics[0]) < 1.0
    assert set(costs_from(fabrics[0], QWEN)(16, topology)) == set(KINDS)
    seconds = max(took_s for _, took_s in results)
    record_property("table", ("calibration", f"{topology.num_ranks} gloo ranks", "seconds", f"{seconds:.2f}"))
