"""Groups of one generation beside another: built in the background, refused, lost and torn down. Runs in 9 s."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist

from phalanx.parallel.membership import build
from phalanx.parallel.rendezvous import host_store
from phalanx.parallel.topology import EpTopology
from phalanx.parallel.transport import run
from tests.parallel import ep_programs
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.multi


@pytest.fixture
def address():
    store, address = host_store()
    yield address
    del store


def test_one_rank_needs_nobody():
    topology = EpTopology.uniform(1, 1)
    store = dist.HashStore()
    alone = build(store, prefix="ep", generation=1, topology=topology, rank=0, device=torch.device("cpu"), timeout_s=1)
    assert len(run(ep_programs.all_requests(topology, 0), alone.transport)) == 36
    assert ep_programs.agree(alone, 3) == [3]
    alone.destroy()


def test_the_next_generation_is_built_while_this_one_serves(address):
    for rank, (rounds, *values) in enumerate(run_ranks(4, ep_programs.grow_while_serving, address, 0.5)):
        assert values == [0, 1, 2, 3]
        # 0.5 s of rounds with a pause of 2 ms: fewer means that serving waited for the late rank.
        assert rank == 3 or rounds > 50, rounds


def test_a_member_that_never_comes_hurts_only_the_new_generation(address):
    for message, took_s, values in run_ranks(2, ep_programs.miss_one, address):
        assert message.startswith("ranks [2] of ep/1/2 did not come in time")
        assert 0.4 < took_s < 1.5
        assert values == [0, 1]


def test_killed_member_is_noticed_and_left_behind(address, record_property):
    topology, smaller = EpTopology.uniform(2, 2), EpTopology(((0, 1), (2,)))
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=ep_programs.victim, args=(address, topology, 3, 20), daemon=True)
    process.start()
    try:
        results = run_ranks(3, ep_programs.survive, address, topology, smaller)
    finally:
        process.join(5)
        process.close()
    for rank, (noticed_s, again_s, values, message) in enumerate(results):
        assert message.startswith(f"rank {rank}, hop "), message
        assert noticed_s < 1.0, results
        assert again_s < 2.0, results
        assert values == [0, 1, 2]
    slowest = max(result[0] for result in results), max(result[1] for result in results)
    row = ("rank killed, 2x2 gloo", "noticed by all, ms", f"{slowest[0] * 1e3:.0f}")
    record_property("table", ("membership", *row))
    record_property("table", ("membership", row[0], "serving again, ms", f"{slowest[1] * 1e3:.0f}"))


def test_fifty_generations_leave_nothing_behind(address):
    for census in run_ranks(2, ep_programs.cycle, address, 50):
        assert [tuple(counts) for counts in census] == [tuple(census[0])] * 50


def test_rows_move_by_tag(address):
    for rank, moved in enumerate(run_ranks(3, ep_programs.move_rows, address, 3)):
        others = [other for other in reversed(range(3)) if other != rank]
        assert moved == [10 * other + tag for tag in (2, 1) for other in others]


def test_a_row_is_seen_to_come(address):
    """The sender never knows; the receiver asks without waiting."""
    assert run_ranks(2, ep_programs.late_row, address) == [[False], [False, True, True, False]]


def test_rows_on_their_way_do_not_keep_a_generation_alive(address):
    assert run_ranks(2, ep_programs.abandon, address) == [1000 * (11 + 12), 1000 * (1 + 2)]


def test_what_cannot_be_is_refused(address):
    for rank, messages in enumerate(run_ranks(2, ep_programs.refusals, address)):
        used, outside, interface, destroyed = messages
        assert used == f"ConfigError: rank {rank} has met under ep/1/1 before; use another prefix or generation"
        assert outside == "ConfigError: rank 2 is outside an expert group of 2 ranks"
        assert interface.startswith("ConfigError: cannot use network interface 'no0': ")
        assert destroyed == f"ReplicaLostError: rank {rank} has no group for hop 'node': it was destroyed"


def test_private_names_of_torch():
    """What `membership.py` uses and torch does not document; a new torch that renames it fails here first."""
    gloo, group = dist.ProcessGroupGloo, dist.ProcessGroup
    for name in ("_Options", "create_device", "create_default_device"):
        assert hasattr(gloo, name), name
    for name in ("_timeout", "_threads", "_devices"):
        assert hasattr(gloo._Options(), name), name
    for name in (
        "_register_backend",
        "_set_default_backend",
        "send",
        "recv",
        "abort",
        "_start_coalescing",
        "_end_coalescing",
    ):
        assert hasattr(group, name), name
    assert hasattr(dist.TCPStore, "clone")
    assert group.BackendType.GLOO != group.BackendType.NCCL
