"""Planning cost on the engine's thread: scheduler and KV metadata with running decodes, against the design's goal.

    python benchmarks/scheduler.py [--freeze]

Every sequence decodes one token per step, one step ahead of the results, and crosses a block boundary every
`BLOCK_SIZE` steps, at its own time. CPU time of the thread, so that a busy machine does not count; medians and 99th
percentiles over `NUM_STEPS` steps. `--freeze` takes what exists at the start out of the garbage collector's sight
(`gc.freeze`): without it a full collection walks every block of the pool now and then.
"""

import gc
import statistics
import sys
import time
from array import array
from collections import deque
from typing import NamedTuple

from phalanx.runtime.kv.hashing import root_hash
from phalanx.runtime.kv.spec import KVSpec
from phalanx.runtime.plan import StepPlan, StepResult, encode
from phalanx.runtime.sampling_params import SamplingParams
from phalanx.runtime.scheduler import Scheduler, SchedulerConfig
from phalanx.runtime.sequence import Sequence

BLOCK_SIZE = 64
PROMPT_TOKENS = 512
NUM_STEPS = 2000
GOAL_MS = {256: 1.0}
"""Median of plan + apply, by running sequences."""


class StepCost(NamedTuple):
    """Milliseconds of one step."""

    schedule: float
    encode: float
    apply: float

    @property
    def total(self) -> float:
        return self.schedule + self.encode + self.apply


def make_scheduler(num_sequences: int) -> Scheduler:
    """A scheduler with this many sequences queued, that will all run and never end."""
    max_model_len = PROMPT_TOKENS + BLOCK_SIZE + 2 * NUM_STEPS
    blocks = num_sequences * (max_model_len // BLOCK_SIZE + 1)
    spec = KVSpec(block_size=BLOCK_SIZE, num_blocks=blocks + blocks // 50, max_model_len=max_model_len)
    config = SchedulerConfig(max_batch_tokens=8192, max_sequences=num_sequences, max_in_flight=2)
    scheduler = Scheduler(config, spec)
    root = root_hash({"model": "benchmark"})
    for i in range(num_sequences):
        scheduler.add(
            Sequence(
                job=f"request-{i}",
                epoch=1,
                choice=0,
                prompt=array("I", range(i, i + PROMPT_TOKENS + i % BLOCK_SIZE)),
                output=array("I"),
                params=SamplingParams(),
                seed=i,
                eos_token_ids=frozenset([2]),
                max_tokens=2 * NUM_STEPS,
                root=root,
                order=(0, i, 0),
            )
        )
    return scheduler


def answer(plan: StepPlan) -> StepResult:
    """What a rank would send back."""
    rows = plan.domains[0].rows
    slots = [slot for slot, sample in zip(rows[::3], rows[2::3], strict=True) if sample]
    return StepResult(plan.step, plan.generation, 0, slots, [7] * len(slots), [], [], [], 0.0)


def measure(num_sequences: int) -> list[StepCost]:
    """Cost of each step once every sequence decodes."""
    gc.unfreeze()
    gc.collect()
    scheduler, launched, costs = make_scheduler(num_sequences), deque[StepResult](), list[StepCost]()
    if "--freeze" in sys.argv:
        gc.collect()
        gc.freeze()
    while len(costs) < NUM_STEPS:
        start = time.thread_time()
        plan = scheduler.schedule()
        scheduled = time.thread_time()
        assert plan is not None, "a step is always possible"
        encode(plan)
        encoded = time.thread_time()
        launched.append(answer(plan))
        if scheduler.num_in_flight < 2:
            continue
        result = launched.popleft()
        before = time.thread_time()
        scheduler.apply(result)
        applied = time.thread_time()
        if len(result.slots) == num_sequences:
            times = (scheduled - start, encoded - scheduled, applied - before)
            costs.append(StepCost(*(1e3 * seconds for seconds in times)))
    scheduler.check()
    return costs


def main() -> None:
    print(f"{'running':>8} {'':6} {'schedule':>9} {'encode':>8} {'apply':>8} {'all':>8}   milliseconds per step")
    for num_sequences in (64, 256, 1024):
        costs = measure(num_sequences)
        columns = [*zip(*costs, strict=True), [cost.total for cost in costs]]
        medians = [statistics.median(column) for column in columns]
        tails = [statistics.quantiles(column, n=100)[98] for column in columns]
        goal = GOAL_MS.get(num_sequences)
        verdict = "" if goal is None else f"   goal <= {goal}  {'ok' if medians[-1] <= goal else 'MISSED'}"
        for name, row in (("median", medians), ("p99", tails)):
            print(f"{num_sequences:8} {name:6} {row[0]:9.3f} {row[1]:8.3f} {row[2]:8.3f} {row[3]:8.3f}{verdict}")
            verdict = ""


if __name__ == "__main__":
    main()
