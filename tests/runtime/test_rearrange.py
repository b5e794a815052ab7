"""Domains come and go under load: every stream equals its oracle, nothing leaks. About 4 s.

Fake ranks keep their slots and KV while they stay, as real ones do. With `reset` some of them have executed plans that
are never answered, and all forget their slots.
"""

import random
from array import array
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.runtime.plan import StepPlan
from phalanx.runtime.sampling_params import SamplingParams
from phalanx.runtime.scheduler import Scheduler
from phalanx.runtime.sequence import FINISHED, RUNNING, Sequence
from tests.runtime.fake_ranks import VOCABULARY, FakeRank, make_config, oracle

MAX_RANKS = 4


class Replica:
    """A scheduler and one fake rank per domain, each with the plans it has not executed."""

    def __init__(self, rng: random.Random, *, dp: int = 2, pp: int = 1) -> None:
        self.rng = rng
        self.config = make_config(dp=dp, pp=pp, device="cuda", num_blocks=16, max_sequences=3)
        self.scheduler = Scheduler(self.config.scheduler, self.config.kv)
        self.ranks = [FakeRank(self.config, dp_rank) for dp_rank in range(dp)]
        self.queues: list[deque[StepPlan]] = [deque() for _ in self.ranks]
        self.sequences: list[tuple[Sequence, list[int]]] = []
        self.cancelled: set[str] = set()

    def add(self, length: int | None = None) -> None:
        number, limit = len(self.sequences), self.config.kv.max_model_len
        prompt = random.Random(self.rng.randrange(3)).choices(range(1, VOCABULARY), k=limit)
        prompt = prompt[: length or self.rng.randint(1, limit - 2)]
        max_tokens = self.rng.randint(1, min(12, limit - len(prompt)))
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, top_k=self.rng.randrange(5))
        seq = Sequence(
            job=f"job-{number}",
            epoch=1,
            choice=0,
            prompt=array("I", prompt),
            output=array("I"),
            params=params,
            seed=number,
            eos_token_ids=frozenset(),
            max_tokens=max_tokens,
            root=b"r" * 32,
            order=(self.rng.randrange(2), number, 0),
        )
        self.sequences.append((seq, oracle(prompt, params, 0).token_ids))
        self.scheduler.add(seq)

    def cancel(self) -> None:
        live = [seq for seq, _ in self.sequences if seq.status != FINISHED]
        if live:
            seq = self.rng.choice(live)
            self.cancelled.add(seq.job)
            self.scheduler.cancel(seq)

    def plan(self) -> bool:
        plan = self.scheduler.schedule()
        if plan is not None:
            assert len(plan.domains) == len(self.ranks)
            for queue in self.queues:
                queue.append(plan)
        return plan is not None

    def deliver(self, dp_rank: int) -> bool:
        if not self.queues[dp_rank]:
            return False
        self.scheduler.apply(self.ranks[dp_rank].execute(self.queues[dp_rank].popleft(), frozenset(), None))
        return True

    def drain(self) -> None:
        for dp_rank in range(len(self.ranks)):
            while self.deliver(dp_rank):
                pass

    def keep(self) -> list[int | None]:
        """Some of the ranks, in their order, and some new ones."""
        old = [index for index in range(len(self.ranks)) if self.rng.random() < 0.7]
        new = self.rng.randint(0 if old else 1, MAX_RANKS - len(old))
        return [*old, *([None] * new)]

    def rearrange(self, keep: list[int | None], *, reset: bool) -> None:
        if reset:
            for rank, queue in zip(self.ranks, self.queues, strict=True):
                while queue and self.rng.random() < 0.5:
                    rank.execute(queue.popleft(), frozenset(), None)
        else:
            self.drain()
        self.scheduler.rearrange(keep, reset=reset)
        ranks = []
        for dp_rank, index in enumerate(keep):
            rank = FakeRank(self.config, dp_rank) if index is None else self.ranks[index]
            rank.dp_rank = dp_rank
            if reset:
                rank.slots = [None] * self.config.max_sequences
            ranks.append(rank)
        self.ranks, self.queues = ranks, [deque() for _ in ranks]

    def check(self) -> None:
        self.scheduler.check()
        for seq, answer in self.sequences:
            output = seq.tokens[seq.num_prompt :].tolist()
            assert output == answer[: len(output)], f"{seq.job} continues as its oracle"
        running = [seq for domain in self.scheduler.domains for _, seq in domain.running]
        assert len({seq.job for seq in running}) == len(running), "a sequence runs in one domain"
        assert len(running) == sum(seq.status == RUNNING for seq, _ in self.sequences)

    def finish(self) -> None:
        """Everything ends, and everything is back."""
        for _ in range(10_000):
            if not self.plan() and not any(self.queues):
                break
            self.drain()
        for seq, answer in self.sequences:
            assert seq.status == FINISHED
            if seq.job not in self.cancelled:
                assert seq.tokens[seq.num_prompt :].tolist() == answer
        self.scheduler.check()
        for domain in self.scheduler.domains:
            assert domain.cache.num_free == self.config.kv.num_blocks - 1
            assert sorted(domain.free_slots) == list(range(self.config.max_sequences))
            assert not domain.running
        assert self.scheduler.num_waiting == 0


@settings(max_examples=120)
@given(st.integers(0, 2**32 - 1), st.sampled_from([False, True]))
def test_streams_survive_any_change_of_domains(seed: int, reset: bool) -> None:
    rng = random.Random(seed)
    replica = Replica(rng)
    for _ in range(80):
        match rng.choice(["add", "plan", "plan", "deliver", "deliver", "cancel", "rearrange"]):
            case "add" if len(replica.sequences) < 14:
                replica.add()
            case "plan":
                replica.plan()
            case "deliver":
                replica.deliver(rng.randrange(len(replica.ranks)))
            case "cancel" if rng.random() < 0.2:
                replica.cancel()
            case "rearrange" if rng.random() < 0.5:
                replica.rearrange(replica.keep(), reset=reset and rng.random() < 0.7)
        replica.check()
    replica.finish()


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_stages_too(seed: int) -> None:
    rng = random.Random(seed)
    replica = Replica(rng, pp=2)
    for _ in range(60):
        match rng.choice(["add", "plan", "plan", "deliver", "deliver", "rearrange"]):
            case "add" if len(replica.sequences) < 14:
                replica.add()
            case "plan":
                replica.plan()
            case "deliver":
                replica.deliver(rng.randrange(len(replica.ranks)))
            case "rearrange" if rng.random() < 0.3:
                replica.rearrange(replica.keep(), reset=False)
        replica.check()
    replica.finish()


def test_steps_in_flight_forbid_it_without_reset() -> None:
    replica = Replica(random.Random(0))
    replica.add()
    replica.plan()
    with pytest.raises(RuntimeError, match=r"1 steps are in flight; domains cannot change"):
        replica.scheduler.rearrange([0, 1])
    replica.check()


def test_who_stays_keeps_slots_and_blocks_who_goes_is_placed_again() -> None:
    replica = Replica(random.Random(1), dp=2)
    for _ in range(4):
        replica.add()
    while any(seq.status != RUNNING and seq.status != FINISHED for seq, _ in replica.sequences):
        replica.plan()
        replica.drain()
    staying = [(seq, seq.slot, seq.num_computed) for _, seq in replica.scheduler.domains[1].running]
    going = [seq for _, seq in replica.scheduler.domains[0].running]
    assert staying or going
    replica.rearrange([1, None], reset=False)
    assert [(seq, seq.slot, seq.num_computed) for _, seq in replica.scheduler.domains[0].running] == staying
    assert all(seq.domain == 0 for seq, _, _ in staying)
    assert replica.scheduler.num_waiting >= len(going)
    replica.check()
    replica.finish()


def test_reset_keeps_the_settled_blocks_findable() -> None:
    replica = Replica(random.Random(2), dp=1)
    replica.add(length=30)
    seq, _ = replica.sequences[0]
    for _ in range(2):
        assert replica.plan()
        replica.drain()
    assert seq.num_settled == 16, "two steps of 8 tokens"
    assert replica.plan(), "a step that nobody will answer"
    replica.rearrange([0], reset=True)
    plan = replica.scheduler.schedule()
    assert plan is not None
    (init,) = plan.domains[0].admit
    assert init.num_computed_tokens == 16
