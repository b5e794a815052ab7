"""Nodes and ranks of an expert group, and who exchanges with whom. Milliseconds."""

import pytest

from phalanx.parallel.topology import EpTopology
from phalanx.parallel.transport import Hop, peers

HOPS: tuple[Hop, ...] = ("flat", "rail", "node")
TOPOLOGIES = [
    EpTopology.uniform(1, 1),
    EpTopology.uniform(1, 4),
    EpTopology.uniform(4, 1),
    EpTopology.uniform(3, 4),
    EpTopology(((0, 1, 2), (3,))),
    EpTopology(((0, 1, 2, 3, 4, 5), (6, 7, 8))),
    EpTopology(((0, 3), (1, 2, 4))),
]


def test_names_become_nodes_in_the_order_of_their_first_rank():
    topology = EpTopology.of_names(["b", "a", "b", "c", "a"])
    assert topology.nodes == ((0, 2), (1, 4), (3,))
    assert topology.node_of == (0, 1, 0, 2, 1)
    assert topology.local_of == (0, 0, 1, 0, 1)
    assert (topology.num_ranks, topology.num_nodes, topology.max_local, topology.is_uniform) == (5, 3, 2, False)
    assert EpTopology.of_names(["x", "x", "y", "y"]) == EpTopology.uniform(2, 2)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_places_are_where_nodes_say(topology):
    for rank in range(topology.num_ranks):
        assert topology.nodes[topology.node_of[rank]][topology.local_of[rank]] == rank
    assert topology.is_uniform == (topology.num_ranks == topology.num_nodes * topology.max_local)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_peers_agree_about_each_other(topology):
    """All peers of a rank see the same group in the same order, so that one process group serves them."""
    for hop in HOPS:
        for rank in range(topology.num_ranks):
            members = peers(topology, rank, hop)
            assert rank in members
            assert all(peers(topology, member, hop) == members for member in members)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_rail_and_node_reach_everybody(topology):
    for source in range(topology.num_ranks):
        rail = peers(topology, source, "rail")
        for target in range(topology.num_ranks):
            forwarder = topology.forwarder(source, topology.node_of[target])
            assert forwarder in rail
            assert target in peers(topology, forwarder, "node")
        assert topology.forwarder(source, topology.node_of[source]) == source
        if topology.is_uniform:
            assert rail == tuple(topology.forwarder(source, node) for node in range(topology.num_nodes))


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_forwarders_share_the_work(topology):
    """Of the ranks of a node, no two serve numbers of sources that differ by more than the ragged rest."""
    for node, ranks in enumerate(topology.nodes):
        for other in topology.nodes:
            served = [sum(topology.forwarder(source, node) == rank for source in other) for rank in ranks]
            assert max(served) - min(served) <= 1
