"""Continuous batching under one token budget per step. Pure: events in, `StepPlan` and `TokenRow` out.

A step holds the running decodes first, then prefill chunks of running sequences, then newly admitted ones. The engine
runs ahead: plan N+1 is made while step N runs, so a decode row may stand for a token nobody here has seen yet.
"""

import heapq
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from phalanx.runtime.frames import FinishReason, TokenLogprobs, TokenRow
from phalanx.runtime.kv.prefix_cache import Match, PrefixCache
from phalanx.runtime.kv.spec import KVSpec
from phalanx.runtime.plan import Extend, PlanError, SlotInit, StepPlan, StepResult, roll_hash
from phalanx.runtime.sequence import FINISHED, NO_SLOT, REPORTED, RUNNING, UNKNOWN, WAITING, Sequence
from phalanx.runtime.step_builder import Row, StepBuilder

MAX_PREFIX_WAIT = 64
"""Schedule passes a request waits for another that is computing its next block (kv.md section 4)."""

MAX_PASSED = 64
"""Waiting requests that one schedule pass may pass over, so that a burst of equal prompts costs it little."""

NO_MATCH = Match((), 0)

Order = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of a step.

    Attributes:
        max_batch_tokens: rows of a step, per dp rank.
        max_sequences: sequences running at once, per dp rank; also the number of slots.
        num_domains: dp ranks.
        is_pipelined: a sequence may be in one step in flight only, and a step takes its share of the decodes.
        max_in_flight: steps in flight; `pp` with stages, 1 or 2 without.
    """

    max_batch_tokens: int
    max_sequences: int
    num_domains: int = 1
    is_pipelined: bool = False
    max_in_flight: int = 1


class Domain:
    """One dp rank: its KV metadata, slots, running sequences sorted by `order`, and steps in flight, oldest first."""

    def __init__(self, spec: KVSpec, max_sequences: int, *, prefix_cache: bool) -> None:
        self.cache = PrefixCache(spec, enabled=prefix_cache)
        self.running: list[tuple[Order, Sequence]] = []
        self.in_flight: deque[tuple[int, list[Row]]] = deque()
        self.free_slots = list(range(max_sequences - 1, -1, -1))
        self.released: list[int] = []


class Scheduler:
    """Which tokens run in the next step, on which blocks; see `schedule` and `apply`."""

    def __init__(self, config: SchedulerConfig, spec: KVSpec, *, prefix_cache: bool = True) -> None:
        self.config, self.spec, self._prefix_cache = config, spec, prefix_cache
        self.domains = [
            Domain(spec, config.max_sequences, prefix_cache=prefix_cache) for _ in range(config.num_domains)
        ]
        self.num_preemptions = self.num_prompt_tokens = self.num_generated_tokens = 0
        self.step = 0
        self.num_waiting = 0
        self._waiting: list[tuple[Order, Sequence]] = []
        self._hash = 0

    @property
    def num_running(self) -> int:
        """Sequences that hold a place in a domain."""
        return sum(len(domain.running) for domain in self.domains)

    @property
    def num_in_flight(self) -> int:
        """Steps planned whose results have not all arrived."""
        return max(len(domain.in_flight) for domain in self.domains)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence; the caller has checked that it can ever fit."""
        heapq.heappush(self._waiting, (seq.order, seq))
        self.num_waiting += 1

    def cancel(self, seq: Sequence) -> None:
        """Drop a sequence wherever it is: its blocks are free at once, its rows in flight are ignored."""
        status, seq.status = seq.status, FINISHED
        if status == RUNNING:
            self._leave(seq)
        elif status == WAITING:
            self._leave_queue()

    def schedule(self, *, allow_empty: bool = False) -> StepPlan | None:
        """The next step, or None when there is nothing to do or enough is in flight.

        Args:
            allow_empty: plan a step without rows too; its result proves that every rank is alive.
        """
        if self.num_in_flight >= self.config.max_in_flight:
            return None
        builders = []
        for domain in self.domains:
            # The list is shared: a slot released while this step is planned may be admitted again in it.
            builder = StepBuilder(self.config.max_batch_tokens, domain.released)
            builders.append(builder)
            self._take_running(domain, builder)
        if self._waiting:
            self._admit_waiting(builders)
        built = [
            builder.build(domain.in_flight[0][0] if domain.in_flight else self.step)
            for domain, builder in zip(self.domains, builders, strict=True)
        ]
        if not allow_empty and not any(rows for _, rows in built):
            return None
        for domain, (plan, rows) in zip(self.domains, built, strict=True):
            domain.released = []
            domain.in_flight.append((self.step, rows))
            self._hash = roll_hash(self._hash, plan.rows)
        step = StepPlan(self.step, 0, self._hash, [plan for plan, _ in built])
        self.step += 1
        return step

    def apply(self, result: StepResult) -> list[TokenRow]:
        """Settle one dp rank's part of its oldest step in flight; returns the new tokens.

        Raises:
            PlanError: the result is not that of the oldest step in flight; nothing has changed then.
        """
        rows = self._rows_of(result)
        domain = self.domains[result.dp_rank]
        domain.in_flight.popleft()
        for slot, entries in result.prompt_logprobs:
            self._collect_prompt_logprobs(rows, slot, entries)
        out, index, failed = [], 0, frozenset(result.failed)
        for seq, end, sample in rows:
            seq.num_in_flight -= 1
            # One that was preempted meanwhile settles nothing; it is not admitted again before its rows are back.
            if seq.status == RUNNING:
                seq.num_settled = end
                if end >= seq.next_full:
                    self._seal(domain, seq)
            if sample:
                if seq.status != FINISHED:
                    logprobs = result.logprobs[index] if result.logprobs else None
                    out.append(self._append(seq, result.token_ids[index], logprobs, index in failed))
                if index in failed:
                    self._forget_contents(domain, seq)
                index += 1
            if seq.num_in_flight == 0 and seq.status != RUNNING:
                self._return_slot(seq)
        return out

    @property
    def digest(self) -> int:
        """Of all rows planned so far."""
        return self._hash

    def rearrange(self, keep: Iterable[int | None], *, reset: bool = False) -> None:
        """Change the domains while no step is in flight; sequences of a domain that goes wait to be placed again.

        Args:
            keep: the old index of each new domain; None = a new, empty one.
            reset: drop the steps in flight, because some rank will never answer them: every sequence is preempted, and
                what the steps computed counts as not computed.

        Raises:
            RuntimeError: steps are in flight, without `reset`.
        """
        if self.num_in_flight and not reset:
            raise RuntimeError(f"{self.num_in_flight} steps are in flight; domains cannot change")
        config, kept = self.config, list(keep)
        for index, domain in enumerate(self.domains):
            rows = {row.seq for _, step in domain.in_flight for row in step}
            domain.in_flight.clear()
            for seq in rows:
                seq.num_in_flight, seq.num_known = 0, len(seq.tokens)
            if index not in kept or reset:
                for _, seq in list(domain.running):
                    self._preempt(seq)
            if reset:
                domain.free_slots, domain.released = list(range(config.max_sequences - 1, -1, -1)), []
            for seq in rows:
                seq.slot = NO_SLOT if seq.status != RUNNING else seq.slot
        self.domains = [
            Domain(self.spec, config.max_sequences, prefix_cache=self._prefix_cache)
            if index is None
            else self.domains[index]
            for index in kept
        ]
        for index, domain in enumerate(self.domains):
            for _, seq in domain.running:
                seq.domain = index

    def check(self) -> None:
        """All invariants, O(n): slots, queue count, KV metadata.

        Raises:
            AssertionError: one does not hold; a bug of ours.
        """
        assert self.num_waiting == sum(seq.status == WAITING for _, seq in self._waiting), "queue count"
        for index, domain in enumerate(self.domains):
            running = [seq for _, seq in domain.running]
            assert all(seq.status == RUNNING and seq.domain == index for seq in running), "status of running"
            assert [order for order, _ in domain.running] == sorted(seq.order for seq in running), "order of running"
            flying = Counter(row.seq for _, rows in domain.in_flight for row in rows)
            leaving = {seq.slot for seq in flying if seq.status != RUNNING}
            held = [seq.slot for seq in running] + sorted(leaving) + domain.free_slots
            assert sorted(held) == list(range(self.config.max_sequences)), "every slot has one owner"
            assert all(seq.num_in_flight == flying[seq] for seq in {*running, *flying}), "rows in flight"
            for seq in running:
                assert 0 <= seq.num_settled <= seq.num_computed <= seq.table.capacity, "token regions"
                assert seq.num_computed < seq.num_known <= seq.max_length, "a token remains to be computed"
                num_full = seq.num_settled // self.spec.block_size if domain.cache.enabled else 0
                assert seq.table.num_sealed == num_full, "full settled blocks are sealed"
            domain.cache.check([seq.table for seq in running])

    def _take_running(self, domain: Domain, builder: StepBuilder) -> None:
        pipelined, running = self.config.is_pipelined, domain.running
        # A pipelined step takes its share of the decodes only, so that the other stages have steps to run meanwhile.
        share = -(-len(running) // self.config.max_in_flight) if pipelined else len(running)
        chunked, index = [], 0
        while index < len(running):  # `_grow` takes victims off the end
            seq = running[index][1]
            index += 1
            if pipelined and seq.num_in_flight:
                continue
            if seq.num_known - seq.num_computed > 1:
                chunked.append(seq)
            elif (
                share
                and builder.budget
                and seq.num_known < seq.max_length
                and (seq.num_computed < seq.table.capacity or self._grow(domain, seq, builder))
            ):
                builder.take_decode(seq)
                share -= 1
        for seq in chunked:
            self.num_prompt_tokens += builder.take_chunk(seq)

    def _grow(self, domain: Domain, seq: Sequence, builder: StepBuilder) -> bool:
        """Give a decode its next block, preempting from the end of the order; False = it was itself the last."""
        while True:
            block_ids = domain.cache.append(seq.table, seq.num_computed + 1)
            if block_ids is not None:
                first = len(seq.table.block_ids) - len(block_ids)
                builder.extend.append(Extend(seq.slot, first, list(block_ids)))
                return True
            victim = domain.running[-1][1]
            self._preempt(victim)
            if victim is seq:
                return False

    def _preempt(self, victim: Sequence) -> None:
        self._leave(victim)
        # The contents of its blocks stay findable: it resumes by an ordinary prefix match.
        victim.status, victim.num_computed, victim.num_settled, victim.waited = WAITING, 0, 0, 0
        self.num_preemptions += 1
        self.add(victim)

    def _admit_waiting(self, builders: list[StepBuilder]) -> None:
        held: list[tuple[Order, Sequence]] = []
        while self._waiting and len(held) < MAX_PASSED:
            seq = self._waiting[0][1]
            if seq.status == FINISHED:
                heapq.heappop(self._waiting)
            elif seq.num_in_flight:  # preempted; its last rows are on their way
                held.append(heapq.heappop(self._waiting))
            else:
                placed = self._place(seq, builders)
                if placed is None:
                    break
                entry = heapq.heappop(self._waiting)
                if not placed:
                    held.append(entry)
        for entry in held:
            heapq.heappush(self._waiting, entry)

    def _place(self, seq: Sequence, builders: list[StepBuilder]) -> bool | None:
        """Admit into the least busy domain with room; False = let others pass, None = the queue is blocked here."""
        by_load = sorted(range(len(self.domains)), key=lambda index: len(self.domains[index].running))
        for index in by_load:
            domain, builder = self.domains[index], builders[index]
            if not builder.room(seq) or not domain.free_slots:
                continue
            match = NO_MATCH if seq.prompt_logprobs is not None else domain.cache.match(seq.table)
            if seq.waited < MAX_PREFIX_WAIT and domain.cache.is_computing(seq.table, match):
                seq.waited += 1
                return False
            busy = bool(domain.running or domain.in_flight)
            if domain.cache.admit(seq.table, match, len(seq.tokens), use_watermark=busy):
                self._enter(seq, index, match, builder)
                return True
        return None

    def _enter(self, seq: Sequence, index: int, match: Match, builder: StepBuilder) -> None:
        domain = self.domains[index]
        seq.status, seq.domain, seq.slot = RUNNING, index, domain.free_slots.pop()
        seq.num_computed = seq.num_settled = match.num_tokens
        seq.next_full = match.num_tokens + self.spec.block_size
        if seq.num_cached == UNKNOWN:
            seq.num_cached = min(match.num_tokens, seq.num_prompt)
        self.num_waiting -= 1
        insort(domain.running, (seq.order, seq))
        builder.admit.append(SlotInit(seq.slot, seq.tokens.tobytes(), seq.num_prompt, match.num_tokens, seq.sampling))
        builder.extend.append(Extend(seq.slot, 0, list(seq.table.block_ids)))
        self.num_prompt_tokens += builder.take_chunk(seq)

    def _seal(self, domain: Domain, seq: Sequence) -> None:
        domain.cache.commit(seq.table, seq.num_settled)
        seq.next_full = (seq.num_settled // self.spec.block_size + 1) * self.spec.block_size

    def _leave(self, seq: Sequence) -> None:
        domain = self.domains[seq.domain]
        del domain.running[bisect_left(domain.running, (seq.order,))]
        domain.cache.free(seq.table)
        if seq.num_in_flight == 0:
            self._return_slot(seq)

    def _return_slot(self, seq: Sequence) -> None:
        # Not before its last row in flight is back: a late token must not land in the next owner's slot.
        if seq.slot != NO_SLOT:
            domain = self.domains[seq.domain]
            domain.free_slots.append(seq.slot)
            domain.released.append(seq.slot)
            seq.slot = NO_SLOT

    def _leave_queue(self) -> None:
        # The entry stays in the heap until it comes up; those that never do must not pile up.
        self.num_waiting -= 1
        if len(self._waiting) > 2 * self.num_waiting + MAX_PASSED:
            self._waiting = [entry for entry in self._waiting if entry[1].status == WAITING]
            heapq.heapify(self._waiting)

    @staticmethod
    def _forget_contents(domain: Domain, seq: Sequence) -> None:
        """A NaN shows late: whatever the sequence computed, in this life or before, must not be found any more."""
        pool = domain.cache.pool
        blocks = [block for block in map(pool.get, seq.table.cursor.hashes) if block is not None]
        pool.acquire(blocks)  # only held blocks may lose their key
        for block in blocks:
            pool.unseal(block)
        pool.release(blocks)

    def _append(self, seq: Sequence, token_id: int, logprobs: TokenLogprobs | None, failed: bool) -> TokenRow:
        position = seq.num_output
        finish: FinishReason | None = None
        if failed:
            finish = "error"
        else:
            seq.tokens.append(token_id)
            self.num_generated_tokens += 1
            if token_id in seq.stop_ids:
                finish = "stop"
            elif position + 1 >= seq.max_tokens:
                finish = "length"
        if finish is not None:
            self.cancel(seq)
        num_cached, seq.num_cached = seq.num_cached, REPORTED
        return TokenRow(
            seq.job,
            seq.epoch,
            seq.choice,
            position,
            [] if failed else [token_id],
            None if logprobs is None or failed else [_cut(logprobs, seq.sampling.logprobs)],
            finish,
            "the model's logits held NaN or infinity for this row" if failed else None,
            None if seq.prompt_logprobs is None else seq.take_prompt_logprobs(),
            num_cached,
        )

    def _rows_of(self, result: StepResult) -> list[Row]:
        """The rows that a result answers; raises `PlanError`."""
        rank = result.dp_rank
        in_flight = self.domains[rank].in_flight if 0 <= rank < len(self.domains) else deque()
        if not in_flight or in_flight[0][0] != result.step:
            raise PlanError(
                f"dp rank {rank} answered step {result.step}; its oldest step in flight is "
                f"{in_flight[0][0] if in_flight else None}"
            )
        rows = in_flight[0][1]
        slots = [row.seq.slot for row in rows if row.sample]
        if slots != result.slots or len(result.token_ids) != len(slots) or len(result.logprobs) not in (0, len(slots)):
            raise PlanError(
                f"dp rank {rank} answered step {result.step} with {len(result.token_ids)} ids and "
                f"{len(result.logprobs)} logprobs for slots {result.slots}; the plan samples slots {slots}"
            )
        return rows

    @staticmethod
    def _collect_prompt_logprobs(rows: list[Row], slot: int, entries: list[TokenLogprobs]) -> None:
        for seq, end, _ in rows:
            if seq.slot == slot and seq.prompt_logprobs is not None:
                stop = min(end, seq.num_prompt - 1)
                # By position: after a preemption the same entries come again.
                seq.prompt_logprobs[stop - len(entries) : stop] = entries


def _cut(logprobs: TokenLogprobs, count: int) -> TokenLogprobs:
    """What the request asked for: ranks answer all rows of a step alike, with as many as the most demanding wants."""
    if len(logprobs.top_ids) == count:
        return logprobs
    token_id, logprob, rank = logprobs.token_id, logprobs.logprob, logprobs.rank
    return TokenLogprobs(token_id, logprob, rank, logprobs.top_ids[:count], logprobs.top_logprobs[:count])
