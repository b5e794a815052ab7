"""Counting routed experts on the device, and the window over ranks' reports. About 1 s."""

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.errors import ConfigError
from phalanx.moe.load import LoadCounter
from phalanx.moe.load_window import LoadWindow
from phalanx.moe.placement.linear import linear

quick = settings(deadline=None, derandomize=True, max_examples=50)
counts = st.lists(st.integers(0, 9), min_size=3, max_size=3)


@given(
    steps=st.lists(st.tuples(st.integers(0, 1), st.lists(st.tuples(*[st.integers(-1, 4)] * 2), max_size=6)), max_size=8)
)
@quick
def test_counter_counts_each_choice_once(steps: list[tuple[int, list[tuple[int, int]]]]) -> None:
    counter = LoadCounter([5, 7], "cpu")
    expected = [[0] * 5, [0] * 7]
    for layer, rows in steps:
        counter.record(layer, torch.tensor(rows, dtype=torch.int32).reshape(-1, 2))
        for expert in (expert for row in rows for expert in row if expert >= 0):
            expected[layer][expert] += 1
    drained = counter.drain()
    assert [row.tolist() for row in drained] == expected
    assert all(row.dtype == np.int64 for row in drained)
    counter.record(0, torch.tensor([[1, -1]], dtype=torch.int32))
    assert [row.tolist() for row in drained] == expected, "a drained histogram is a copy"
    assert [row.tolist() for row in counter.drain()] == [[0, 1, 0, 0, 0], [0] * 7]


def test_record_is_quick(record_property: Callable[[str, object], None]) -> None:
    """<= 10 us for a decode step; best of many, others use the machine too."""
    counter, ids_TK = LoadCounter([64], "cpu"), torch.randint(-1, 64, (16, 8), dtype=torch.int32)
    times = []
    for _ in range(500):
        start = time.perf_counter()
        counter.record(0, ids_TK)
        times.append(time.perf_counter() - start)
    record_property("table", ("load counter, us for 16 x 8 choices", "record", "best", f"{min(times) * 1e6:.1f}"))
    assert min(times) <= 10e-6


@given(reports=st.lists(st.tuples(st.integers(0, 1), counts, counts), max_size=12))
@quick
def test_window_is_the_sum_of_the_last_reports(reports: list[tuple[int, list[int], list[int]]]) -> None:
    """Stages report their own layers: 0 and 1, or 1 and 2."""
    window = LoadWindow([3, 3, 3], num_reports=4)
    seen: list[list[list[int]]] = [[], [], []]
    for first, low, high in reports:
        window.add(first, [np.array(low), np.array(high)])
        seen[first].append(low)
        seen[first + 1].append(high)
    expected = [np.array([[0, 0, 0], *layer[-4:]]).sum(0).tolist() for layer in seen]
    assert [row.tolist() for row in window.load()] == expected


def test_window_keeps_no_reference_to_what_it_was_given() -> None:
    window, row = LoadWindow([2], 1), np.array([1, 2])
    window.add(0, [row])
    row[:] = 100
    window.load()[0][:] = 50
    assert window.load()[0].tolist() == [1, 2]
    window.add(0, [np.array([3, 3])])
    assert window.load()[0].tolist() == [3, 3]


def test_window_balancedness() -> None:
    window = LoadWindow([4, 4])
    window.add(0, [np.array([5, 1, 1, 1]), np.array([1, 1, 1, 1])])
    assert window.balancedness(linear([4, 4], 2, 2)).tolist() == [4 / 6, 1]


@pytest.mark.parametrize(("first", "rows"), [(0, [[1, 2, 3]]), (0, [[-1, 2]]), (1, [[1, 2], [1, 2]])])
def test_window_refuses_other_shapes(first: int, rows: list[list[int]]) -> None:
    window = LoadWindow([2, 2])
    with pytest.raises(ConfigError, match=f"expert load of layers {first} ..."):
        window.add(first, [np.array(row) for row in rows])
    assert sum(row.sum() for row in window.load()) == 0
