"""The recent load of every expert, summed over ranks and steps: what a balancer looks at. No torch."""

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import ConfigError
from phalanx.moe.placement.types import Load, Placement


class LoadWindow:
    """Sum of each MoE layer's last `num_reports` reports; a report is what one rank counted in some steps.

    Args:
        num_experts: E of each layer.
        num_reports: reports kept per layer, >= 1; with reports every 32 steps, 256 of 8 ranks are 1024 steps.
    """

    def __init__(self, num_experts: Sequence[int], num_reports: int = 256) -> None:
        self._reports: list[deque[NDArray[np.int64]]] = [deque(maxlen=num_reports) for _ in num_experts]
        self._sums = [np.zeros(experts, dtype=np.int64) for experts in num_experts]

    def add(self, first_layer: int, counts: Sequence[Load]) -> None:
        """Take one report and forget the oldest of those layers when the window is full.

        Args:
            first_layer: index of the first row's layer.
            counts: tokens per expert of consecutive layers.

        Raises:
            ConfigError: a layer or a number of experts that is not served, or a negative count; nothing is taken.
        """
        rows = [np.array(row, dtype=np.int64) for row in counts]
        served = [len(total) for total in self._sums[first_layer : first_layer + len(rows)]]
        if [row.shape for row in rows] != [(experts,) for experts in served] or any((row < 0).any() for row in rows):
            raise ConfigError(
                f"expert load of layers {first_layer} ... {first_layer + len(rows) - 1} has rows of "
                f"{[row.size for row in rows]} counts, which must be >= 0; served are layers of {served} experts"
            )
        for row, total, reports in zip(rows, self._sums[first_layer:], self._reports[first_layer:], strict=False):
            if len(reports) == reports.maxlen:
                total -= reports[0]
            reports.append(row)
            total += row

    def load(self) -> list[NDArray[np.int64]]:
        """Tokens per expert over the window, one row per layer; copies."""
        return [total.copy() for total in self._sums]

    def balancedness(self, placement: Placement) -> NDArray[np.float64]:
        """(L,) mean over maximal rank load of each layer, had the window's load met this placement."""
        return placement.balancedness(self._sums)
