"""Single decisions of the scheduler, one at a time; `test_engine.py` proves them together. About 1 s."""

import re
from array import array
from typing import Any
from unittest import mock

import msgspec
import pytest

from phalanx.runtime.engine import Engine
from phalanx.runtime.frames import Abort, Place, TokenLogprobs, TokenRow
from phalanx.runtime.kv.prefix_cache import Table
from phalanx.runtime.plan import PlanError, StepPlan, StepResult
from phalanx.runtime.sampling_params import SamplingParams
from phalanx.runtime.scheduler import MAX_PASSED, MAX_PREFIX_WAIT, Scheduler
from phalanx.runtime.sequence import Sequence
from phalanx.runtime.step_builder import MAX_PROMPT_LOGPROBS
from tests.runtime.fake_ranks import FakeExecutor, FakeRank, make_config

ROOT = b"r" * 32


def sequence(
    arrival: int, prompt: list[int], *, priority: int = 0, output: tuple[int, ...] = (), **params: Any
) -> Sequence:
    """A greedy request that no token stops."""
    checked = SamplingParams(max_tokens=params.pop("max_tokens", 4), ignore_eos=True, **params)
    assert checked.max_tokens is not None
    return Sequence(
        job=f"job-{arrival}",
        epoch=1,
        choice=0,
        prompt=array("I", prompt),
        output=array("I", output),
        params=checked,
        seed=arrival,
        eos_token_ids=frozenset(),
        max_tokens=checked.max_tokens,
        root=ROOT,
        order=(priority, arrival, 0),
    )


class Bench:
    """A scheduler and one fake rank per domain."""

    def __init__(self, **sizes: Any) -> None:
        self.config = make_config(**sizes)
        self.scheduler = Scheduler(self.config.scheduler, self.config.kv, prefix_cache=self.config.prefix_cache)
        self.ranks = [FakeRank(self.config, dp_rank) for dp_rank in range(self.config.shape.dp)]
        self.num_cached: dict[str, int] = {}

    def plan(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.scheduler.check()
        assert plan is not None
        return plan

    def answer(self, plan: StepPlan, dp_rank: int = 0, poison: int | None = None) -> list[TokenRow]:
        rows = self.scheduler.apply(self.ranks[dp_rank].execute(plan, frozenset(), poison))
        self.scheduler.check()
        self.num_cached |= {row.job: row.num_cached_tokens for row in rows if row.num_cached_tokens >= 0}
        return rows

    def turn(self) -> StepPlan:
        """A step and its answers."""
        plan = self.plan()
        for dp_rank in range(len(self.ranks)):
            self.answer(plan, dp_rank)
        return plan

    def admitted(self) -> list[int]:
        """Arrival numbers of those that enter in the next step."""
        return [init.sampling.seed for part in self.turn().domains for init in part.admit]


def rows_of(plan: StepPlan, domain: int = 0) -> list[tuple[int, int]]:
    """(num_tokens, sample) per row."""
    rows = plan.domains[domain].rows
    return list(zip(rows[1::3], rows[2::3], strict=True))


def test_smaller_priority_first_then_arrival() -> None:
    bench = Bench(max_sequences=1)
    for arrival, priority in enumerate((1, 0, 0, -1)):
        bench.scheduler.add(sequence(arrival, [1 + arrival], priority=priority, max_tokens=1))
    assert [bench.admitted() for _ in range(4)] == [[3], [1], [2], [0]]


def test_decodes_then_running_chunks_then_admissions_under_one_budget() -> None:
    bench = Bench(max_batch_tokens=8)
    bench.scheduler.add(sequence(0, [1, 2]))
    assert rows_of(bench.turn()) == [(2, 1)]
    bench.scheduler.add(sequence(1, list(range(3, 14))))
    assert rows_of(bench.turn()) == [(1, 1), (7, 0)]
    bench.scheduler.add(sequence(2, list(range(20, 29))))
    assert rows_of(bench.turn()) == [(1, 1), (4, 1), (3, 0)]
    assert rows_of(bench.turn()) == [(1, 1), (1, 1), (6, 1)]


def test_the_last_in_order_is_preempted_and_resumes_from_its_blocks() -> None:
    bench = Bench(block_size=2, num_blocks=6, max_model_len=10)
    for arrival in range(2):
        bench.scheduler.add(sequence(arrival, [1 + arrival, 3, 4, 5], max_tokens=5))
    bench.turn()  # 2 blocks each, the fifth goes to the older one
    plan = bench.turn()
    assert bench.scheduler.num_preemptions == 1
    assert plan.domains[0].release == [1]
    assert rows_of(plan) == [(1, 1)]
    for _ in range(3):
        bench.turn()
    plan = bench.turn()
    (init,) = plan.domains[0].admit
    assert init.sampling.seed == 1
    assert init.num_computed_tokens == 2  # the older one needed the tail block, the head is still there
    assert len(init.token_ids) == 4 * 5  # with the token that was sampled before it was preempted


def test_an_idle_pool_gives_its_last_block_a_busy_one_does_not() -> None:
    bench = Bench(block_size=1, num_blocks=201, max_model_len=200, max_batch_tokens=200)
    assert bench.scheduler.domains[0].cache.watermark_blocks == 2
    bench.scheduler.add(sequence(0, [1] * 196 + [2], max_tokens=3))
    bench.scheduler.add(sequence(1, [3, 4], max_tokens=1))
    assert bench.admitted() == [0]
    assert bench.admitted() == []
    assert bench.admitted() == []
    assert bench.admitted() == [1]
    bench = Bench(block_size=1, num_blocks=201, max_model_len=200, max_batch_tokens=200)
    bench.scheduler.add(sequence(0, [1] * 199, max_tokens=1))
    assert bench.admitted() == [0]


def test_an_equal_prompt_waits_for_the_one_that_computes_it() -> None:
    bench, prompt = Bench(max_batch_tokens=8), list(range(1, 22))
    for arrival, text in enumerate((prompt, prompt, [30, 31])):
        bench.scheduler.add(sequence(arrival, text))
    assert [bench.admitted() for _ in range(4)] == [[0], [], [2], [1]]
    assert bench.num_cached == {"job-0": 0, "job-1": 20, "job-2": 0}


def test_nobody_waits_for_a_prefix_for_ever() -> None:
    bench, prompt = Bench(pp=2, max_batch_tokens=2, num_blocks=200, max_model_len=200), list(range(1, 191))
    first, second = sequence(0, prompt), sequence(1, prompt)
    bench.scheduler.add(first)
    bench.scheduler.add(second)
    while second.num_computed == 0:
        plan = bench.plan()
        if bench.scheduler.schedule() is None:  # the first is in flight, the second waits
            bench.answer(plan)
    assert second.waited == MAX_PREFIX_WAIT
    assert first.num_remaining > 1


def test_a_burst_of_equal_prompts_costs_a_pass_little(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(pp=2, max_batch_tokens=4)
    for arrival in range(300):
        bench.scheduler.add(sequence(arrival, list(range(1, 21))))
    bench.plan()
    cache = bench.scheduler.domains[0].cache
    match = mock.Mock(wraps=cache.match)
    monkeypatch.setattr(cache, "match", match)
    assert bench.scheduler.schedule() is None
    assert match.call_count == MAX_PASSED
    assert bench.scheduler.num_waiting == 299
    bench.scheduler.check()


def test_cancelled_requests_leave_no_trace_behind_a_blocked_head() -> None:
    bench = Bench(max_sequences=1)
    bench.scheduler.add(sequence(0, [1], max_tokens=30))
    bench.scheduler.add(sequence(1, [2]))
    bench.turn()
    for arrival in range(2, 1000):
        seq = sequence(arrival, [3])
        bench.scheduler.add(seq)
        bench.scheduler.cancel(seq)
        bench.scheduler.cancel(seq)
    bench.scheduler.check()
    assert bench.scheduler.num_waiting == 1
    assert len(bench.scheduler._waiting) <= 2 + MAX_PASSED + 1


def test_a_step_of_a_pipeline_takes_its_share_of_the_decodes() -> None:
    bench = Bench(pp=4, max_sequences=8, max_batch_tokens=16)
    for arrival in range(8):
        bench.scheduler.add(sequence(arrival, [1 + arrival], max_tokens=20))
    bench.answer(bench.plan())
    plans = [bench.plan() for _ in range(4)]
    assert [len(rows_of(plan)) for plan in plans] == [2, 2, 2, 2]
    assert bench.scheduler.schedule() is None
    assert len({slot for plan in plans for slot in plan.domains[0].rows[::3]}) == 8


def test_the_least_busy_domain_with_room_takes_the_next() -> None:
    bench = Bench(dp=3, max_sequences=2)
    for arrival in range(6):
        bench.scheduler.add(sequence(arrival, [1 + arrival], max_tokens=9))
    plan = bench.turn()
    assert [[init.sampling.seed for init in part.admit] for part in plan.domains] == [[0, 3], [1, 4], [2, 5]]
    bench.scheduler.add(sequence(6, [9]))
    assert bench.admitted() == []


def test_an_empty_step_only_when_asked_for() -> None:
    bench = Bench(dp=2)
    assert bench.scheduler.schedule() is None
    plan = bench.scheduler.schedule(allow_empty=True)
    assert plan is not None
    assert [part.rows for part in plan.domains] == [[], []]
    assert bench.answer(plan, 0) == bench.answer(plan, 1) == []
    assert bench.scheduler.num_in_flight == 0


def test_prompt_logprobs_share_one_budget_of_logit_rows() -> None:
    bench = Bench(num_blocks=600, max_model_len=900, max_batch_tokens=2000, device="cuda")
    for arrival in range(3):
        bench.scheduler.add(sequence(arrival, [1 + arrival] * 200, prompt_logprobs=3))
    assert MAX_PROMPT_LOGPROBS == 256
    assert rows_of(bench.turn()) == [(200, 1), (56, 0)]
    # The first decodes without touching the budget, although its prompt logprobs are still on their way.
    assert rows_of(bench.turn()) == [(1, 1), (144, 1), (112, 0)]
    assert rows_of(bench.turn()) == [(1, 1), (1, 1), (88, 1)]


def test_ranks_are_asked_for_prompt_logprobs_once() -> None:
    fresh, resumed = sequence(0, [1, 2, 3], prompt_logprobs=2), sequence(1, [1, 2, 3], output=(4,), prompt_logprobs=2)
    assert (fresh.sampling.prompt_logprobs, fresh.prompt_logprobs) == (2, [])
    assert (resumed.sampling.prompt_logprobs, resumed.prompt_logprobs) == (-1, None)
    bench = Bench()
    bench.scheduler.add(fresh)
    (row,) = bench.answer(bench.plan())
    assert row.prompt_logprobs is not None
    assert len(row.prompt_logprobs) == 2
    assert (fresh.sampling.prompt_logprobs, fresh.prompt_logprobs) == (-1, None)


@pytest.mark.parametrize("is_poisoned", [False, True])
@pytest.mark.parametrize("loss", ["none", "preempted", "cancelled"])
def test_contents_of_a_failed_row_are_not_found_whatever_became_of_it(loss: str, is_poisoned: bool) -> None:
    """The second request's first chunk goes wrong and is sealed; its second one tells, and comes late."""
    bench = Bench(device="cuda", block_size=2, num_blocks=5, max_model_len=8, max_batch_tokens=5)
    old, young = sequence(0, [1], max_tokens=7), sequence(1, [2, 3, 4, 5, 6, 7], max_tokens=2)
    bench.scheduler.add(old)
    bench.scheduler.add(young)
    first, second = bench.plan(), bench.plan()
    assert (rows_of(first), rows_of(second)) == ([(1, 1), (4, 0)], [(1, 1), (2, 1)])
    bench.answer(first, poison=1 if is_poisoned else None)
    assert young.table.num_sealed == 2
    if loss == "preempted":
        bench.plan()
        assert bench.scheduler.num_preemptions == 1
    elif loss == "cancelled":
        bench.scheduler.cancel(young)
    rows = {row.job: row for row in bench.answer(second)}
    match = bench.scheduler.domains[0].cache.match(Table(array("I", [2, 3, 4, 5, 6, 7]), ROOT))
    assert match.num_tokens == (0 if is_poisoned else 4)
    assert rows["job-0"].finish is None
    if loss != "cancelled":
        row = rows["job-1"]
        assert (row.finish, row.token_ids == []) == (("error", True) if is_poisoned else (None, False))
        assert row.error is None or "NaN" in row.error


def result_of(plan: StepPlan, **changes: Any) -> StepResult:
    slots = [slot for slot, sample in zip(plan.domains[0].rows[::3], plan.domains[0].rows[2::3], strict=True) if sample]
    return msgspec.structs.replace(StepResult(plan.step, 0, 0, slots, [5] * len(slots), [], [], [], 0.0), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 1}, "dp rank 0 answered step 1; its oldest step in flight is 0"),
        ({"step": 7}, "step 7; its oldest"),
        ({"dp_rank": 2}, "dp rank 2 answered step 0; its oldest step in flight is None"),
        ({"dp_rank": -1}, "dp rank -1 answered"),
        ({"slots": [1, 0]}, r"for slots \[1, 0\]; the plan samples slots \[0, 1\]"),
        ({"slots": [0]}, r"for slots \[0\]; the plan samples"),
        ({"slots": [0, 1, 2], "token_ids": [5, 5, 5]}, "3 ids"),
        ({"token_ids": [5]}, "1 ids and 0 logprobs"),
        ({"logprobs": [None]}, "2 ids and 1 logprobs"),
    ],
)
def test_a_result_that_does_not_fit_is_refused_and_changes_nothing(changes: dict[str, Any], message: str) -> None:
    bench = Bench(device="cuda")
    for arrival in range(2):
        bench.scheduler.add(sequence(arrival, [1 + arrival]))
    plan = bench.plan()
    bench.plan()
    with pytest.raises(PlanError, match=message):
        bench.scheduler.apply(result_of(plan, **changes))
    bench.scheduler.check()
    assert [row.token_ids for row in bench.scheduler.apply(result_of(plan))] == [[5], [5]]
    with pytest.raises(PlanError, match="answered step 0; its oldest step in flight is 1"):
        bench.scheduler.apply(result_of(plan))


def test_logprobs_and_errors_ride_on_their_own_rows() -> None:
    bench = Bench()
    for arrival, wanted in enumerate((None, 1, None)):
        bench.scheduler.add(sequence(arrival, [1 + arrival], logprobs=wanted))
    entry = TokenLogprobs(5, -0.5, 1, [5], [-0.5])
    rows = bench.scheduler.apply(result_of(bench.plan(), logprobs=[None, entry, None], failed=[2]))
    assert [row.logprobs for row in rows] == [None, [entry], None]
    assert [row.finish for row in rows] == [None, None, "error"]
    assert [row.token_ids for row in rows] == [[5], [5], []]
    assert bench.scheduler.num_generated_tokens == 2


class TestEngine:
    """What `Engine` adds: limits, and requests that are over before they begin."""

    def engine(self) -> Engine:
        config = make_config()
        return Engine(config, FakeExecutor(config))

    @pytest.mark.parametrize(
        ("num_prompt", "max_tokens", "message"),
        [(0, 3, "prompt is empty"), (38, 3, r"prompt \(38 tokens\) \+ max_tokens \(3\) .* limit \(40\); use .* <= 2")],
    )
    def test_a_request_that_cannot_fit_is_answered(self, num_prompt: int, max_tokens: int, message: str) -> None:
        engine = self.engine()
        params = SamplingParams(max_tokens=max_tokens, n=3)
        engine.place(Place("a", 7, b"\1\0\0\0" * num_prompt, [b"", None, b""], params, 0))
        rows = engine.step()
        assert [(row.choice, row.epoch, row.finish) for row in rows] == [(0, 7, "error"), (2, 7, "error")]
        assert all(re.search(message, row.error or "") for row in rows)
        assert not engine.has_work
        engine.check()

    def test_unknown_jobs_are_nobodys_business(self) -> None:
        engine = self.engine()
        engine.abort(Abort("nobody", 0))
        assert engine.step() == []
        assert not engine.has_work
