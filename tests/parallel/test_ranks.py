"""Collectives, sharded layers and pipeline lanes on gloo ranks, against one rank. Runs in 15 s."""

import functools

import pytest
import torch

from phalanx.parallel.group import ONE_HOP_BYTES
from phalanx.parallel.mesh import MeshShape
from phalanx.parallel.rendezvous import host_store, single
from tests.parallel import programs
from tests.support.ranks import RankError, run_mesh, run_ranks

pytestmark = pytest.mark.multi
ALONE = single(torch.device("cpu"))


@pytest.mark.parametrize("size", [2, 4])
def test_collectives(size):
    inputs = [torch.arange(6.0).view(2, 3) + 100 * rank for rank in range(size)]
    for summed, columns, rows, same, empty, half in run_mesh(MeshShape(tp=size), programs.collectives):
        assert torch.equal(summed, sum(inputs))
        assert torch.equal(columns, torch.cat(inputs, dim=1))
        assert torch.equal(rows, torch.cat(inputs, dim=0))
        assert torch.equal(same, inputs[-1])
        assert empty.shape == (0, 3 * size)
        assert torch.equal(half, torch.full((4,), size / 2))


@pytest.mark.parametrize("num_rows", [3, 500], ids=["one hop", "in parts"])
@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_in_rank_order(size, num_rows):
    assert (num_rows * 401 * 4 > ONE_HOP_BYTES) == (num_rows == 500)
    ordered = []
    for dtype in programs.DTYPES:
        parts = [programs.summand(rank, num_rows, dtype) for rank in range(size)]
        wide = [part.float() if dtype == torch.bfloat16 else part for part in parts]
        ordered.append(functools.reduce(torch.add, wide).to(dtype).double())
    for got in run_mesh(MeshShape(tp=size), programs.sums, num_rows):
        for mine, expected in zip(got, ordered, strict=True):
            assert torch.equal(mine, expected)


def test_groups_follow_the_axes():
    shape = MeshShape(pp=2, dp=2, tp=2)
    for rank, (tp, place) in enumerate(run_mesh(shape, programs.coordinates)):
        here = shape.coordinate(rank)
        assert tp.tolist() == [shape.rank(here.pp, here.dp, i) for i in range(2)]
        assert place.tolist() == [here.tp]


@pytest.mark.parametrize("size", [2, 4])
def test_column_parallel(size):
    q, k, v = programs.column(ALONE).split([12, 6, 6], dim=1)
    for rank, got in enumerate(run_mesh(MeshShape(tp=size), programs.column)):
        heads, kv_heads = 4 // size, max(2 // size, 1)
        kv_head = rank * 2 // size
        expected = [q[:, 3 * heads * rank :][:, : 3 * heads]]
        expected += [x[:, 3 * kv_head :][:, : 3 * kv_heads] for x in (k, v)]
        torch.testing.assert_close(got, torch.cat(expected, dim=1))


@pytest.mark.parametrize("size", [2, 4])
def test_row_parallel_adds_the_bias_once(size):
    for got in run_mesh(MeshShape(tp=size), programs.row):
        torch.testing.assert_close(got, programs.row(ALONE))


@pytest.mark.parametrize("size", [2, 4])
def test_vocabulary_parallel(size):
    table = programs.draw(0, 9, 5)
    alone = programs.vocabulary(ALONE)
    assert torch.equal(alone[0], table[[0, 8, 3, 2, 8, 5]])
    for embedded, logits, nothing in run_mesh(MeshShape(tp=size), programs.vocabulary):
        assert torch.equal(embedded, alone[0])
        torch.testing.assert_close(logits, alone[1])
        assert nothing.shape == (0, 9)


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("stages", [2, 3])
def test_lanes_keep_order_with_steps_in_flight(stages, run_ahead):
    expected = [row + 10 * step for step in range(programs.STEPS) for row in range(step % 4)]
    seen = run_mesh(MeshShape(pp=stages), programs.lanes, run_ahead, timeout_s=30)
    assert seen[0].tolist() == expected


def test_a_missing_rank_is_named():
    with pytest.raises(RankError, match=r"ranks \[1\] are still running after 2 s"):
        run_ranks(2, programs.hang, timeout_s=2)
    with pytest.raises(RankError, match=r"(?s)rank 1 failed:.*no luck"):
        run_ranks(2, programs.fail)


def test_a_rank_that_nobody_joins_gives_up():
    store, address = host_store()
    [message] = run_ranks(1, programs.join_alone, address)
    assert message.startswith(f"rank 0 did not meet the other 1 ranks at {address} within 1 s: ")
    del store
    [message] = run_ranks(1, programs.join_alone, address)
    assert message.startswith(f"no store answers at {address} within 1 s: ")


def test_a_collective_times_out():
    with pytest.raises(RankError, match=r"(?s)rank 0 failed:.*([Tt]imed out|[Tt]imeout)"):
        run_mesh(MeshShape(tp=2), programs.lonely, timeout_s=5)
