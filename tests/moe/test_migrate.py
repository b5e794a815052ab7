"""Migration plans carried out on toy rows; shrinking and growing groups. About 5 s."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.errors import ConfigError
from phalanx.moe.migrate import MoveBatch, plan_moves
from phalanx.moe.placement import incremental, linear, spread
from phalanx.moe.placement.types import LayerPlacement
from phalanx.moe.resize import add_ranks, drop_ranks, shrink_target
from phalanx.parallel.topology import EpTopology
from tests.support import placement_study as study
from tests.support.placements import Group, groups, is_valid, layers, loads

quick = settings(deadline=None, derandomize=True, max_examples=300)


def carry_out(old: LayerPlacement, batches: list[MoveBatch], group: Group, staging_rows: int) -> list[str]:
    """Contents of all slots after the batches, moved as ranks do: slots -> staging rows, then staging rows -> slots."""
    size, node_of = group.slots_per_rank, group.topology.node_of
    rows = [f"expert {expert}" for expert in old.physical_to_logical]
    version, before = old.version, old
    for batch in batches:
        staging: dict[tuple[int, int], str] = {}
        sends: dict[int, int] = {}
        receives: dict[int, int] = {}
        entered: Counter[tuple[int, int]] = Counter()
        for expert, src_slot, dst_slot, staging_row in batch.moves:
            src, dst = src_slot // size, dst_slot // size
            assert src != dst
            assert rows[src_slot] == f"expert {expert}"
            assert 0 <= staging_row < staging_rows
            assert (dst, staging_row) not in staging
            staging[dst, staging_row] = rows[src_slot]
            assert sends.setdefault(src, dst) == dst, "one peer to send to"
            assert receives.setdefault(dst, src) == src, "one peer to receive from"
            holders = [node_of[slot // size] for slot in before.logical_to_physical[expert]]
            assert (node_of[src] == node_of[dst]) == (node_of[dst] in holders), "from the own node if it has one"
            entered[expert, node_of[dst]] += node_of[src] != node_of[dst]
        assert max(entered.values()) <= 1, "an expert crosses once into a node, and is spread there later"
        assert len({move.dst_slot for move in batch.moves}) == len(batch.moves) > 0
        for _, _, dst_slot, staging_row in batch.moves:
            rows[dst_slot] = staging.pop((dst_slot // size, staging_row))
        version += 1
        assert batch.layer.version == version
        assert [f"expert {expert}" for expert in batch.layer.physical_to_logical] == rows
        assert is_valid(batch.layer.physical_to_logical, group)
        before = batch.layer
    return rows


@pytest.mark.parametrize("redundant", [True, False])
@given(data=st.data())
@quick
def test_batches_lead_to_the_new_placement(redundant: bool, data: st.DataObject) -> None:
    group = data.draw(groups(max_ranks=8, redundant=redundant))
    old, new = data.draw(layers(group, version=5)), data.draw(layers(group))
    staging_rows, kept, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), group.slots_per_rank
    batches = plan_moves(old, new, group.topology, slots_per_rank=size, staging_rows=staging_rows, min_replicas=kept)
    rows = carry_out(old, batches, group, staging_rows)
    for rank in range(group.num_ranks):
        wanted = {f"expert {expert}" for expert in new.experts_of(rank, size)}
        assert set(rows[rank * size : (rank + 1) * size]) == wanted
    fewest = study.num_moved(old.physical_to_logical, new.physical_to_logical, size)
    assert sum(len(batch.moves) for batch in batches) == fewest


def test_two_ranks_exchange_experts_in_one_batch() -> None:
    (batch,) = plan_moves(
        LayerPlacement(0, (0, 1, 2, 3)),
        LayerPlacement(0, (0, 2, 1, 3)),
        EpTopology.uniform(2, 1),
        slots_per_rank=2,
        staging_rows=1,
    )
    assert sorted(batch.moves) == [(1, 1, 2, 0), (2, 2, 1, 0)]


@pytest.mark.parametrize("shape", study.SHAPES[:2], ids=str)
def test_plan_of_a_big_group_is_short(shape: study.Shape) -> None:
    """Cooling by 10 % of the slots takes a few batches, a fresh solve (over 90 %) tens; nothing takes long."""
    rng, size, topology = np.random.default_rng(0), shape.slots_per_rank, shape.topology
    load_E = study.zipf(rng, shape.num_experts, 1.0)
    later_E = study.noisy(rng, load_E, 0.1)
    old = spread.place_layer(load_E, topology, size)
    group = Group(topology, shape.num_experts, size)
    for new, most in (
        (incremental.place_layer(later_E, topology, size, old, group.num_slots // 10), 6),
        (spread.place_layer(later_E, topology, size, old), 40),
    ):
        batches = plan_moves(old, new, topology, slots_per_rank=size, staging_rows=2)
        carry_out(old, batches, group, 2)
        assert len(batches) <= most


@pytest.mark.parametrize(("ranks", "experts", "size"), [(8, 64, 16), (8, 64, 20), (64, 256, 8)])
def test_second_copies_stay_live_on_the_way(ranks: int, experts: int, size: int) -> None:
    """Between two placements with each expert twice, with no slot to spare too; without asking they do not."""
    rng, topology = np.random.default_rng(0), EpTopology.uniform(ranks // 4, 4)
    load_E = study.zipf(rng, experts, 1.0)
    old = spread.place_layer(load_E, topology, size, min_replicas=2)
    new = spread.place_layer(study.noisy(rng, load_E, 0.3), topology, size, old, 2)
    batches, hasty = (
        plan_moves(old, new, topology, slots_per_rank=size, staging_rows=4, min_replicas=kept) for kept in (2, 1)
    )
    carry_out(old, batches, Group(topology, experts, size), 4)
    assert all(min(batch.layer.num_replicas) >= 2 for batch in batches)
    assert not all(min(batch.layer.num_replicas) >= 2 for batch in hasty)
    assert len(batches) <= 2 * len(hasty)


def test_plan_refuses_what_does_not_fit() -> None:
    layer, topology = LayerPlacement(0, (0, 1, 2, 3)), EpTopology.uniform(2, 1)
    with pytest.raises(ConfigError, match=r"staging_rows \(0\)"):
        plan_moves(layer, layer, topology, slots_per_rank=2, staging_rows=0)
    with pytest.raises(ConfigError, match="from 4 slots of 4 experts to 4 of 3 on 2 ranks"):
        plan_moves(layer, LayerPlacement(0, (0, 1, 2, 0)), topology, slots_per_rank=2, staging_rows=1)
    with pytest.raises(ConfigError, match=r"placement to move to: rank 0 holds experts \[0\] more than once"):
        plan_moves(
            LayerPlacement(0, (0, 1, 0, 2)), LayerPlacement(0, (0, 0, 1, 2)), topology, slots_per_rank=2, staging_rows=1
        )


@given(data=st.data())
@quick
def test_shrink_moves_only_orphans_and_can_be_reached(data: st.DataObject) -> None:
    group = data.draw(groups(redundant=True))
    size, old = group.slots_per_rank, data.draw(layers(group))
    fewest = -(-group.num_experts // size)
    survivors = data.draw(st.sets(st.integers(0, group.num_ranks - 1), min_size=fewest))
    target = shrink_target(old, group.topology, survivors, slots_per_rank=size)
    assert is_valid(target.physical_to_logical, group)
    changed = [
        slot for slot in range(group.num_slots) if target.physical_to_logical[slot] != old.physical_to_logical[slot]
    ]
    orphans = set(range(group.num_experts)).difference(*(old.experts_of(rank, size) for rank in survivors))
    assert sorted(target.physical_to_logical[slot] for slot in changed) == sorted(orphans)
    assert {slot // size for slot in changed} <= survivors
    carry_out(old, plan_moves(old, target, group.topology, slots_per_rank=size, staging_rows=2), group, 2)
    dropped = drop_ranks(target, survivors, slots_per_rank=size)
    assert is_valid(dropped.physical_to_logical, Group(EpTopology.uniform(1, len(survivors)), group.num_experts, size))
    assert [dropped.experts_of(i, size) for i in range(len(survivors))] == [
        target.experts_of(r, size) for r in sorted(survivors)
    ]
    assert dropped.version == target.version + 1


def test_shrink_spreads_orphans_over_ranks_and_nodes() -> None:
    topology = EpTopology.uniform(3, 2)
    layer = linear.linear([10], 6, 4).layers[0]  # ranks hold 0-3, 4-7, 8-1, 2-5, 6-9, 0-3
    target = shrink_target(layer, topology, [1, 2, 3, 5], slots_per_rank=4)
    assert target == layer  # 9 and 8 are on rank 2
    lonely = LayerPlacement(0, (0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1, 6, 7, 0, 1))
    target = shrink_target(lonely, EpTopology.uniform(4, 2), range(6), slots_per_rank=2)
    received = [rank for rank in range(8) if target.experts_of(rank, 2) != lonely.experts_of(rank, 2)]
    assert len({rank // 2 for rank in received}) == len(received) == 2


def test_shrink_refuses_with_the_numbers() -> None:
    layer = linear.linear([10], 4, 3).layers[0]
    with pytest.raises(ConfigError, match="3 ranks of 3 expert slots hold 9 of 10 experts; at least 4 ranks must stay"):
        shrink_target(layer, EpTopology.uniform(1, 4), [0, 1, 3], slots_per_rank=3)
    with pytest.raises(ConfigError, match=r"survivors \[0, 4\] are not ranks of the 4"):
        shrink_target(layer, EpTopology.uniform(1, 4), [0, 4], slots_per_rank=3)
    with pytest.raises(ConfigError, match=r"placement without 1 ranks: experts \[2\] \(1 of 3\) are on no rank"):
        drop_ranks(LayerPlacement(0, (0, 1, 2, 0)), [0], slots_per_rank=2)


@given(data=st.data())
@quick
def test_shrink_keeps_several_copies_with_the_fewest_moves(data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, 3))
    group = data.draw(groups(max_slots=8, copies=wanted))
    size, old = group.slots_per_rank, data.draw(layers(group))
    fewest = -(-data.draw(st.sampled_from([1, wanted])) * group.num_experts // size)
    survivors = data.draw(st.sets(st.integers(0, group.num_ranks - 1), min_size=fewest))
    target = shrink_target(old, group.topology, survivors, slots_per_rank=size, min_replicas=wanted)
    assert is_valid(target.physical_to_logical, group)
    least = max(1, min(wanted, len(survivors) * size // group.num_experts))
    before, after = (Counter(e for rank in survivors for e in x.experts_of(rank, size)) for x in (old, target))
    assert all(after[expert] >= min(before[expert], least) for expert in range(group.num_experts))
    assert min(after[expert] for expert in range(group.num_experts)) >= least
    changed = sum(a != b for a, b in zip(old.physical_to_logical, target.physical_to_logical, strict=True))
    assert changed == sum(max(0, least - before[expert]) for expert in range(group.num_experts))
    assert target.version == old.version + bool(changed)
    dropped = drop_ranks(target, survivors, slots_per_rank=size)
    assert dropped.missing_copies(wanted) == 0


@pytest.mark.parametrize(("size", "singles"), [(24, 0), (16, 32)])
def test_a_scale_down_leaves_second_copies_where_they_fit(size: int, singles: int) -> None:
    """From 8 ranks to 6; 96 slots hold 64 experts, but not twice: copies are then as the load had them."""
    topology = EpTopology.uniform(2, 4)
    old = linear.linear([64], 8, size).layers[0]
    target = shrink_target(old, topology, range(6), slots_per_rank=size, min_replicas=2)
    assert drop_ranks(target, range(6), slots_per_rank=size).num_replicas.count(1) == singles


@given(data=st.data())
@quick
def test_new_ranks_bring_missing_copies_first(data: st.DataObject) -> None:
    group, num_new = data.draw(groups(max_ranks=5)), data.draw(st.integers(1, 4))
    old, load_E, size = data.draw(layers(group)), data.draw(loads(group.num_experts)), group.slots_per_rank
    topology = EpTopology.uniform(1, group.num_ranks + num_new)
    new = add_ranks(old, num_new, size, load_E, topology, 2)
    assert is_valid(new.physical_to_logical, Group(topology, group.num_experts, size))
    single = old.num_replicas.count(1)
    if topology.num_ranks * size >= 2 * group.num_experts:
        assert new.num_replicas.count(1) == max(0, single - num_new * size)


@given(data=st.data())
@quick
def test_growing_leaves_old_slots_alone(data: st.DataObject) -> None:
    group, num_new = data.draw(groups(max_ranks=5)), data.draw(st.integers(1, 4))
    old, load_E = data.draw(layers(group, version=2)), data.draw(loads(group.num_experts))
    names = [f"node {group.topology.node_of[rank]}" for rank in range(group.num_ranks)]
    topology = EpTopology.of_names(
        names + data.draw(st.lists(st.sampled_from(["node 0", "new"]), min_size=num_new, max_size=num_new))
    )
    new = add_ranks(old, num_new, group.slots_per_rank, load_E, topology)
    assert new.version == 3
    assert new.physical_to_logical[: group.num_slots] == old.physical_to_logical
    assert is_valid(new.physical_to_logical, Group(topology, group.num_experts, group.slots_per_rank))


def test_growing_copies_what_is_loaded_most() -> None:
    old = linear.linear([8], 2, 4).layers[0]
    new = add_ranks(old, 1, 4, np.array([1, 90, 1, 80, 1, 70, 1, 60]), EpTopology.uniform(3, 1))
    assert sorted(new.experts_of(2, 4)) == [1, 3, 5, 7]
    with pytest.raises(ConfigError, match="2 ranks and 2 new ones are not the 3 of the topology"):
        add_ranks(old, 2, 4, np.ones(8), EpTopology.uniform(3, 1))
