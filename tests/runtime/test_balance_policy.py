"""When placements are solved and which proposals are taken. Milliseconds, and a drifting load (0.2 s)."""

from dataclasses import replace

import numpy as np

from phalanx.moe.placement import incremental, linear
from phalanx.parallel.topology import EpTopology
from phalanx.runtime.balance_policy import BalanceConfig, BalancePolicy, LayerView, Proposal
from tests.support import placement_study as study

CONFIG = BalanceConfig(interval_steps=100, row_bytes=1000)
FREE = {"step_s": 0.01, "bytes_per_s": 1e9}


def policy(*balancedness: float, config: BalanceConfig = CONFIG, tokens: float = 1000) -> BalancePolicy:
    made = BalancePolicy(config, len(balancedness))
    made.observe([LayerView(value, tokens) for value in balancedness])
    return made


def test_solves_what_is_out_of_balance_once_per_interval() -> None:
    chosen = policy(0.9, 0.99, 0.5)
    assert chosen.decide(99, busy=False).layers == ()
    assert chosen.decide(100, busy=False) == ((0, 2), "2 of 3 layers are out of balance")
    assert chosen.decide(101, busy=False) == ((), "looked at in step 100")
    assert chosen.decide(199, busy=False).layers == ()
    assert chosen.decide(200, busy=False).layers == (0, 2)


def test_waits_while_busy_and_looks_as_soon_as_it_may() -> None:
    chosen = policy(0.9)
    assert chosen.decide(100, busy=True) == ((), "a scale operation, a migration or a solve runs")
    assert chosen.decide(130, busy=False).layers == (0,)
    assert chosen.decide(200, busy=False).layers == ()


def test_never_without_interval_and_not_on_few_tokens() -> None:
    assert policy(0.1, config=replace(CONFIG, interval_steps=0)).decide(10**6, busy=False) == ((), "rebalancing is off")
    few = policy(0.1, tokens=99)
    assert few.decide(100, busy=False) == ((), "fewer than 100 tokens per expert seen")
    few.observe([LayerView(0.1, 100)])
    assert few.decide(101, busy=False).layers == (0,), "the look was put off, not used up"
    assert BalancePolicy(CONFIG, 2).decide(100, busy=False).layers == ()


def test_takes_what_gains_enough() -> None:
    chosen = policy(0.9, 0.9, 0.9)
    proposals = {0: Proposal(0.9, 0.97, 5), 1: Proposal(0.9, 0.92, 5), 2: Proposal(0.9, 0.9, 0)}
    assert chosen.accept(proposals, **FREE) == (0,)


def test_takes_what_is_worth_its_bytes() -> None:
    """Gain 10 % of half a step of 10 ms over 100 steps = 50 ms; 10 rows of 1000 bytes at 200 kB/s = 50 ms."""
    proposal = {0: Proposal(0.9, 1.0, 10)}
    assert policy(0.9).accept(proposal, step_s=0.01, bytes_per_s=201e3) == (0,)
    assert policy(0.9).accept(proposal, step_s=0.01, bytes_per_s=199e3) == ()
    assert policy(0.9).accept(proposal, step_s=0.02, bytes_per_s=199e3) == (0,)


def test_a_refused_layer_rests_until_it_gets_worse_a_taken_one_goes_on() -> None:
    chosen = policy(0.9, 0.9)
    assert chosen.accept({0: Proposal(0.9, 0.91, 5), 1: Proposal(0.9, 0.95, 5)}, **FREE) == (1,)
    chosen.observe([LayerView(0.89, 1000), LayerView(0.95, 1000)])
    assert chosen.decide(100, busy=False).layers == (1,)
    chosen.observe([LayerView(0.87, 1000), LayerView(0.99, 1000)])
    assert chosen.decide(200, busy=False).layers == (0,)


def test_missing_copies_wait_for_nothing_and_are_taken() -> None:
    chosen = policy(1.0, 0.5, 1.0, tokens=0)
    chosen.observe([LayerView(1.0, 0, 3), LayerView(0.5, 0), LayerView(1.0, 0, 1)])
    assert chosen.decide(1, busy=True).layers == ()
    assert chosen.decide(1, busy=False) == ((0, 2), "experts of 2 of 3 layers lack copies")
    proposals = {0: Proposal(1.0, 0.8, 9, num_restored=2), 2: Proposal(1.0, 0.8, 9)}
    assert chosen.accept(proposals, step_s=0.01, bytes_per_s=1.0) == (0,)
    off = policy(0.1, config=replace(CONFIG, interval_steps=0))
    off.observe([LayerView(0.1, 1000, 3)])
    assert off.decide(10**6, busy=False).layers == ()


def test_another_group_starts_anew() -> None:
    chosen = policy(0.9)
    chosen.accept({0: Proposal(0.9, 0.91, 5)}, **FREE)
    chosen.enter()
    assert chosen.decide(100, busy=False).layers == ()
    chosen.observe([LayerView(0.9, 1000)])
    assert chosen.decide(200, busy=False).layers == (0,)


def test_drifting_load_stays_balanced_with_few_moves() -> None:
    """Load drifts by 5 % per interval, 60 times: from `linear` to balance in bounded moves, then < 6 % of the slots."""
    rng, topology, size = np.random.default_rng(1), EpTopology.uniform(2, 8), 9
    layer = linear.linear([128], 16, size).layers[0]
    chosen, load_E = BalancePolicy(CONFIG, 1), study.zipf(rng, 128, 1.0)
    reached, moved = [], []
    for step in range(100, 6100, 100):
        load_E = study.noisy(rng, load_E, 0.05)
        before = layer.balancedness(load_E, size)
        chosen.observe([LayerView(before, 1000)])
        moved.append(0)
        if chosen.decide(step, busy=False).layers:
            new = incremental.place_layer(load_E, topology, size, layer, 14)
            num_moves = study.num_moved(layer.physical_to_logical, new.physical_to_logical, size)
            if chosen.accept({0: Proposal(before, new.balancedness(load_E, size), num_moves)}, **FREE):
                layer, moved[-1] = new, num_moves
        reached.append(layer.balancedness(load_E, size))
    assert reached[0] < 0.8
    assert min(reached[20:]) > 0.92
    assert np.mean(reached[20:]) > 0.96
    assert max(moved) <= 14
    assert sum(moved[20:]) < 0.06 * 40 * 144
