"""Calibration: curves through whole layers, what those layers send, constants measured on live ranks. Runs in 5 s."""

from typing import NamedTuple

import pytest
import torch

from phalanx.errors import ConfigError
from phalanx.parallel import calibration
from phalanx.parallel.cost_fit import LayerSample, curves_of
from phalanx.parallel.costmodel import KINDS, PHASES, ExpertTraffic, Layer, _volume, costs_from, fabric_of, on_curve
from phalanx.parallel.rendezvous import host_store
from phalanx.parallel.sim_transport import simulate
from phalanx.parallel.topology import EpTopology
from phalanx.parallel.traffic import Traffic
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


class Somewhere(NamedTuple):
    """A transport that is only asked where it is."""

    topology: EpTopology
    rank: int


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "topology",
    [EpTopology.uniform(3, 4), EpTopology.uniform(1, 2), EpTopology.uniform(4, 1), EpTopology(((0, 1, 2), (3,)))],
    ids=["3x4", "1x2", "4x1", "3+1"],
)
def test_timed_layers_send_what_is_modelled(kind, topology):
    traffic = ExpertTraffic.of(256, 4, 48, 4, exact=False)
    layers = [
        calibration._Layer(kind, Somewhere(topology, rank), 32, traffic, torch.device("cpu"))
        for rank in range(topology.num_ranks)
    ]
    record = Traffic(topology)
    simulate(topology, [layer._exchange() for layer in layers], record=record)
    if not topology.is_uniform:
        return  # that it runs on ragged nodes is all: the model takes them as even
    modelled = [_volume(kind, phase, topology.num_nodes, topology.max_local, 32, traffic) for phase in PHASES[1:]]
    for tier in ("inter", "intra"):
        expected = sum(getattr(volume, tier) for volume in modelled)
        assert record.bytes_of(0, tier) == pytest.approx(expected, rel=0.01, abs=1)


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
