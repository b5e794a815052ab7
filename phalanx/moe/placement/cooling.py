"""Change few slots so that the hottest rank gets cooler; both solvers end with it."""

import numpy as np
from numpy.typing import NDArray

from phalanx.moe.placement.working_table import Change, WorkingTable

MIN_GAIN = 0.001
"""Of the mean rank load: what a change must take off the hottest rank."""
MAX_DETOURS = 8


def cool(work: WorkingTable, good_peak: float, max_changed: int) -> WorkingTable:
    """The coolest table found from `work` on, after every expert that lacks replicas got them, as far as can be paid.

    Each step changes something on the hottest rank: it exchanges an expert with another rank, or one of its hottest
    experts gets a slot of a replicated one. When neither helps by itself, a detour: it does so although the other rank
    gets too hot, which then exchanges in turn.

    Args:
        work: full.
        good_peak: stop at this hottest over mean rank load.
        max_changed: slots that may hold another expert than now.
    """
    start_Ps = work.table_Ps.copy()
    work = work.copy()
    for _ in range(max_changed):
        if (change := work.repair()) is None:
            break
        work.apply(change)
    work = _descend(work, start_Ps, good_peak, max_changed)
    for _ in range(MAX_DETOURS):
        if work.peak <= good_peak:
            break
        hot, mean = int(work.rank_load_P.argmax()), float(work.rank_load_P.mean())
        trials = (
            _descend(_after(work, change), start_Ps, good_peak, max_changed)
            for change in (*work.replicas(hot), *work.cooling_swaps(hot, mean))
            if _num_changed(work, change, start_Ps) <= max_changed
        )
        better = next((trial for trial in trials if trial.peak < work.peak - MIN_GAIN), None)
        if better is None:
            break
        work = better
    return work


def _descend(work: WorkingTable, start_Ps: NDArray[np.int64], good_peak: float, max_changed: int) -> WorkingTable:
    """Change `work` while a change helps and can be paid: most gain per slot first."""
    least = MIN_GAIN * float(work.rank_load_P.mean())
    while work.peak > good_peak:
        hot = int(work.rank_load_P.argmax())
        load = float(work.rank_load_P[hot])
        swap, replicas = work.best_swap(hot), work.replicas(hot)
        found = [change for change in (swap, *replicas) if change and change.peak < load - least]
        found = [change for change in found if _num_changed(work, change, start_Ps) <= max_changed]
        if not found:
            break
        work.apply(min(found, key=lambda change: (change.peak - load) / len(change.puts)))
    return work


def _after(work: WorkingTable, change: Change) -> WorkingTable:
    work = work.copy()
    work.apply(change)
    return work


def _num_changed(work: WorkingTable, change: Change, start_Ps: NDArray[np.int64]) -> int:
    """Slots that differ from the start after a change."""
    after_Ps = work.table_Ps.copy()
    for rank, index, expert in change.puts:
        after_Ps[rank, index] = expert
    return int((after_Ps != start_Ps).sum())
