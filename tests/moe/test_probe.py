"""Probes of calibration: real dispatchers with made-up tokens, evenly routed. Runs in 2 s."""

import pytest
import torch

from phalanx.moe.probe import Probe
from phalanx.parallel.costmodel import KINDS, PHASES, ExpertTraffic, Kind, _volume
from phalanx.parallel.sim_transport import simulate
from phalanx.parallel.topology import EpTopology
from phalanx.parallel.traffic import Traffic

NUM_TOKENS = 256


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "topology",
    [EpTopology.uniform(3, 4), EpTopology.uniform(1, 2), EpTopology.uniform(4, 1), EpTopology(((0, 1, 2), (3,)))],
    ids=["3x4", "1x2", "4x1", "3+1"],
)
def test_probes_send_what_is_modelled(kind: Kind, topology: EpTopology, exact: bool) -> None:
    traffic = ExpertTraffic.of(256, 4, 48, 4, exact=exact)
    probe = Probe(traffic, 256, torch.float32, torch.device("cpu"))
    record = Traffic(topology)
    exchanges = [probe.exchange(topology, rank, kind, NUM_TOKENS)() for rank in range(topology.num_ranks)]
    for out_TD in simulate(topology, exchanges, record=record):
        assert out_TD.shape == (NUM_TOKENS, 256)
        assert (out_TD == 4.0).all(), "four copies of a row of ones"
    if not topology.is_uniform:
        return  # the model takes the nodes of ragged groups as even
    modelled = [
        _volume(kind, phase, topology.num_nodes, topology.max_local, NUM_TOKENS, traffic) for phase in PHASES[1:]
    ]
    for tier in ("inter", "intra"):
        expected = sum(getattr(volume, tier) for volume in modelled)
        sent = sum(record.bytes_of(rank, tier) for rank in range(topology.num_ranks)) / topology.num_ranks
        assert sent == pytest.approx(expected, rel=0.02, abs=1)


def test_fewer_experts_than_ranks_are_spread() -> None:
    topology = EpTopology.uniform(2, 4)
    probe = Probe(ExpertTraffic.of(16, 4, 4, 1, exact=False), 16, torch.float32, torch.device("cpu"))
    record = Traffic(topology)
    simulate(topology, [probe.exchange(topology, rank, "flat", 64)() for rank in range(8)], record=record)
    assert all(record.bytes_of(rank, "inter") > 0 for rank in range(8))
