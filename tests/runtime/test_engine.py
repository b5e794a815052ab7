"""Engine and scheduler against fake ranks: every stream equals its oracle, whatever happens around it. About 9 s."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from phalanx.runtime import step_builder
from phalanx.runtime.engine import Engine
from phalanx.runtime.engine_config import EngineConfig
from phalanx.runtime.frames import Abort, Place, TokenRow
from phalanx.runtime.plan import PlanError
from phalanx.runtime.sampling_params import SamplingParams
from tests.runtime.fake_ranks import (
    VOCABULARY,
    Answer,
    FakeExecutor,
    digest_of,
    logprob,
    make_config,
    oracle,
)

MAX_LIVE = 8
ABORTED = "aborted"
Key = tuple[int, int]


def pack(token_ids: list[int]) -> bytes:
    return b"".join(token_id.to_bytes(4, "little") for token_id in token_ids)


class Choice:
    """What the client has of one choice, and what it must get. `finish` None = it runs."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.token_ids: list[int] = []
        self.finish: str | None = None
        self.is_first_row = True


class Request(NamedTuple):
    prompt: list[int]
    params: SamplingParams
    priority: int
    choices: list[Choice]


class Client:
    """Drives an engine over fake ranks and checks every row and every invariant. Arguments are arbitrary integers."""

    def __init__(self, config: EngineConfig, engine_class: type[Engine] = Engine) -> None:
        self.config = config
        self.executor = FakeExecutor(config)
        self.engine = engine_class(config, self.executor)
        self.requests: dict[str, Request] = {}
        self.seeds: dict[str, int] = {}  # of the current placement; also its epoch
        self.never_admitted: dict[Key, tuple[int, int, int]] = {}  # placement -> its place in the queue
        self.num_placements = 0
        self.counts: dict[str, int] = {}

    # operations

    def place(self, document: int, length: int, max_tokens: int, flags: int) -> None:
        """A request over one of a few documents, so that prefixes are shared often; `flags` choose its options."""
        limit = self.engine.limit
        length = 1 + length % (limit - 1)
        prompt = random.Random(document % 3).choices(range(1, VOCABULARY), k=limit)[:length]
        if flags & 1:
            tail = 1 + flags % length
            prompt[-tail:] = random.Random(flags).choices(range(1, VOCABULARY), k=tail)
        max_tokens = 1 + max_tokens % (limit - length)
        params = SamplingParams(
            n=1 + (flags >> 1) % 3 * (flags >> 3 & 1),
            max_tokens=max_tokens,
            min_tokens=max_tokens // 2 * (flags >> 4 & 1),
            ignore_eos=bool(flags & 32),
            stop_token_ids=tuple(range(1, 1 + (flags >> 6) % 4 * 3)),
            logprobs=0 if flags & 256 else None,
            prompt_logprobs=0 if flags & 512 else None,
            top_k=flags % 7,
        )
        choices = [Choice(oracle(prompt, params, choice)) for choice in range(params.n)]
        if flags & 1024:  # resumed: each choice is somewhere on its way
            for index, choice in enumerate(choices):
                answer = choice.answer
                choice.token_ids = answer.token_ids[: (flags >> 11 >> index) % (len(answer.token_ids) + 1)]
                choice.finish = ABORTED if (flags >> 14 >> index) % 4 == 3 else None
        job = f"job-{len(self.requests)}"
        self.requests[job] = Request(prompt, params, (flags >> 20) % 3, choices)
        self._send(job)

    def migrate(self, which: int) -> None:
        """Place a live request again, as after the loss of another replica."""
        if live := self.live():
            self._send(live[which % len(live)])

    def abort(self, which: int, choice: int) -> None:
        if not (live := self.live()):
            return
        job = live[which % len(live)]
        choices = self.requests[job].choices
        number = choice % (len(choices) + 1) - 1
        self.engine.abort(Abort(job, self.seeds[job], number))
        for index, mine in enumerate(choices):
            if number in (-1, index) and mine.finish is None:
                mine.finish = ABORTED
                self.never_admitted.pop((self.seeds[job], index), None)

    def deliver(self, which: int, poison: int | None = None) -> bool:
        return self.executor.deliver(which % self.config.shape.dp, poison)

    def step(self) -> None:
        was_idle, first_step = self.executor.num_unanswered == 0, self.engine.scheduler.step
        rows = self.engine.step()
        self._check_admissions()
        for row in rows:
            self._take(row)
        is_stuck = was_idle and self.live() and not rows and self.engine.scheduler.step == first_step
        assert not is_stuck, "nothing is in flight, and nothing is planned"

    def check(self) -> None:
        self.engine.check()

    def drain(self) -> None:
        """Answer everything. Alone, a request takes a step per token and at most 64 passes behind equal prefixes."""
        live = [self.requests[job] for job in self.live()]
        patience = 20 + 2 * sum(
            (len(request.prompt) + len(choice.answer.token_ids) + 64) for request in live for choice in request.choices
        )
        while self.engine.has_work:
            self.step()
            for dp_rank in range(self.config.shape.dp):
                self.deliver(dp_rank)
            self.check()
            patience -= 1
            assert patience > 0, f"{self.live()} starve"
        assert not self.live(), "a request has no terminal answer"
        assert not self.never_admitted
        self.check()
        assert all(rank.max_prompt_logprobs <= step_builder.MAX_PROMPT_LOGPROBS for rank in self.executor.ranks)
        for domain in self.engine.scheduler.domains:
            assert domain.cache.num_free == self.config.kv.num_blocks - 1
            assert len(domain.free_slots) == self.config.max_sequences

    # oracles

    def live(self) -> list[str]:
        return [job for job in self.seeds if any(c.finish is None for c in self.requests[job].choices)]

    def _send(self, job: str) -> None:
        request, seed = self.requests[job], self.num_placements
        self.num_placements += 1
        outputs = [None if choice.finish else pack(choice.token_ids) for choice in request.choices]
        for index, choice in enumerate(request.choices):
            self.never_admitted.pop((self.seeds.get(job, -1), index), None)
            choice.is_first_row = True
            if choice.finish is None and choice.token_ids != choice.answer.token_ids:
                self.never_admitted[seed, index] = (request.priority, seed, index)
        self.seeds[job] = seed
        self.engine.place(Place(job, seed, pack(request.prompt), outputs, request.params, seed, request.priority))

    def _take(self, row: TokenRow) -> None:
        if row.epoch != self.seeds[row.job]:
            assert not row.token_ids, "a row of an earlier placement"
            return
        request = self.requests[row.job]
        choice = request.choices[row.choice]
        if choice.finish == ABORTED:
            assert not row.token_ids, "a row of a choice that was aborted"
            return
        assert choice.finish is None, "a row after the terminal answer"
        assert row.first_position == len(choice.token_ids)
        self._check_extras(row, request, choice)
        choice.token_ids += row.token_ids
        choice.finish, choice.is_first_row = row.finish, False
        if row.finish is None:
            assert choice.token_ids == choice.answer.token_ids[: len(choice.token_ids)]
            assert len(row.token_ids) == 1
        elif row.finish == "error":
            assert (row.epoch, row.choice) in self.executor.failed, row.error
            assert choice.token_ids == choice.answer.token_ids[: len(choice.token_ids)]
        else:
            assert Answer(choice.token_ids, row.finish) == choice.answer
        if row.finish is not None:
            self.counts[row.finish] = self.counts.get(row.finish, 0) + 1
            self.never_admitted.pop((row.epoch, row.choice), None)

    def _check_extras(self, row: TokenRow, request: Request, choice: Choice) -> None:
        params, prompt = request.params, request.prompt
        wants_prompt = params.prompt_logprobs is not None and not choice.token_ids and choice.is_first_row
        if row.finish != "error":
            expected = [(prompt[p], logprob(digest_of(prompt[:p]), prompt[p])) for p in range(1, len(prompt))]
            got = row.prompt_logprobs
            assert (None if got is None else [e[:2] for e in map(_fields, got)]) == (expected if wants_prompt else None)
        is_computed = bool(row.token_ids) or row.finish == "error"
        assert (0 <= row.num_cached_tokens <= len(prompt)) == (choice.is_first_row and is_computed)
        prefix = digest_of(prompt + choice.token_ids)
        logprobs = [(token_id, logprob(prefix, token_id)) for token_id in row.token_ids]
        wants = params.logprobs is not None and bool(row.token_ids)
        assert (None if row.logprobs is None else [e[:2] for e in map(_fields, row.logprobs)]) == (
            logprobs if wants else None
        )

    def _check_admissions(self) -> None:
        """First admissions come in order of (priority, arrival, choice); only shared prefixes let others pass."""
        for keys in self.executor.admitted:
            entered = [self.never_admitted.pop(key) for key in keys if key in self.never_admitted]
            if entered and self.never_admitted and not self.config.prefix_cache:
                assert max(entered) < min(self.never_admitted.values()), "somebody jumped the queue"
        self.executor.admitted.clear()


def _fields(entry: Any) -> tuple[Any, ...]:
    return (entry.token_id, entry.logprob)


OPERATIONS = ("place", "step", "deliver", "poison", "abort", "migrate")
WEIGHTS = (4, 14, 16, 0.3, 0.6, 0.4)


def drive(client: Client, seed: int, num_operations: int) -> None:
    rng = random.Random(seed)
    for _ in range(num_operations):
        match rng.choices(OPERATIONS, WEIGHTS)[0]:
            case "place" if len(client.live()) < MAX_LIVE:
                client.place(rng.randrange(3), rng.randrange(100), rng.randrange(40), rng.getrandbits(24))
            case "step":
                client.step()
            case "deliver":
                client.deliver(rng.randrange(12))
            case "poison":
                client.deliver(rng.randrange(12), poison=rng.randrange(8))
            case "abort":
                client.abort(rng.randrange(MAX_LIVE), rng.randrange(6))
            case "migrate":
                client.migrate(rng.randrange(MAX_LIVE))
        client.check()
    client.drain()


TINY_POOL = {"num_blocks": 10, "max_model_len": 36}
CONFIGS: dict[str, dict[str, Any]] = {
    "one rank, no run-ahead": {},
    "run-ahead": {"device": "cuda"},
    "run-ahead, tiny pool": {"device": "cuda", **TINY_POOL},
    "run-ahead, tiny pool, block of 1": {"device": "cuda", "block_size": 1, "num_blocks": 30, "max_model_len": 29},
    "no prefix cache": {"device": "cuda", "prefix_cache": False, **TINY_POOL},
    "two domains": {"device": "cuda", "dp": 2, **TINY_POOL},
    "three domains, no prefix cache": {"device": "cuda", "dp": 3, "prefix_cache": False, **TINY_POOL},
    "two stages": {"pp": 2, **TINY_POOL},
    "four stages, two domains": {"pp": 4, "dp": 2, "max_sequences": 6, **TINY_POOL},
    "wide steps": {"device": "cuda", "max_batch_tokens": 64, "max_sequences": 8, "num_blocks": 20},
    "narrow steps": {"device": "cuda", "max_batch_tokens": 2, "max_sequences": 4, **TINY_POOL},
}


@pytest.fixture(autouse=True, scope="module")
def small_prompt_logprob_budget() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_builder, "MAX_PROMPT_LOGPROBS", 5)
        yield


@pytest.mark.parametrize("name", CONFIGS)
def test_two_thousand_operations(name: str) -> None:
    client = Client(make_config(**CONFIGS[name]))
    drive(client, seed=len(name), num_operations=2000)
    scheduler = client.engine.scheduler
    # The machine proves nothing about what never happened.
    assert client.counts["stop"] > 10
    assert client.counts["length"] > 10
    assert client.counts["error"] > 0
    assert scheduler.num_preemptions > 5 or client.config.kv.num_blocks == 40
    assert sum(domain.cache.hits for domain in scheduler.domains) > 50 or not client.config.prefix_cache
    assert max(rank.max_prompt_logprobs for rank in client.executor.ranks) > 1


SMALL = st.integers(0, 7)


class Machine(RuleBasedStateMachine):
    client: Client

    @initialize(
        layout=st.sampled_from(({}, {"device": "cuda"}, {"device": "cuda", "dp": 2}, {"pp": 2}, {"pp": 3, "dp": 2})),
        block_size=st.sampled_from((1, 2, 4)),
        num_blocks=st.integers(8, 24),
        max_batch_tokens=st.integers(1, 24),
        max_sequences=st.integers(1, 5),
        prefix_cache=st.booleans(),
    )
    def start(self, layout: dict[str, Any], block_size: int, num_blocks: int, **sizes: Any) -> None:
        max_model_len = min(40, (num_blocks - 1) * block_size)
        sizes |= {"block_size": block_size, "num_blocks": num_blocks, "max_model_len": max_model_len}
        self.client = Client(make_config(**layout, **sizes))

    @precondition(lambda self: len(self.client.live()) < MAX_LIVE)
    @rule(
        document=st.integers(0, 2),
        length=st.integers(0, 39),
        max_tokens=st.integers(0, 39),
        flags=st.integers(0, 2**22),
    )
    def place(self, document: int, length: int, max_tokens: int, flags: int) -> None:
        self.client.place(document, length, max_tokens, flags)

    @rule()
    def step(self) -> None:
        self.client.step()

    @rule()
    def turn(self) -> None:
        self.client.step()
        for dp_rank in range(self.client.config.shape.dp):
            self.client.deliver(dp_rank)

    @rule(which=SMALL)
    def deliver(self, which: int) -> None:
        self.client.deliver(which)

    @rule(which=SMALL, row=SMALL)
    def poison(self, which: int, row: int) -> None:
        self.client.deliver(which, poison=row)

    @rule(which=SMALL, choice=SMALL)
    def abort(self, which: int, choice: int) -> None:
        self.client.abort(which, choice)

    @rule(which=SMALL)
    def migrate(self, which: int) -> None:
        self.client.migrate(which)

    @invariant()
    def check(self) -> None:
        if hasattr(self, "client"):
            self.client.check()

    def teardown(self) -> None:
        if hasattr(self, "client"):
            self.client.drain()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=120, stateful_step_count=60, deadline=None, derandomize=True, database=None
)


class Mutant(NamedTuple):
    module: str
    old: str
    new: str


# Every guard is removed once, in the source text. A snippet that no longer occurs means that the code has moved: carry
# the mutant over, do not delete it.
MUTANTS = {
    "no token budget": Mutant("step_builder", "room = min(self.budget, seq.num_remaining)", "room = seq.num_remaining"),
    "no logprob budget": Mutant("step_builder", "if seq.prompt_logprobs is None else min", "if True else min"),
    "chunks of one token out of order": Mutant("step_builder", "if num_tokens == 1:", "if num_tokens == 0:"),
    "prompt logprobs asked again": Mutant("sequence", "self.sampling, prompt_logprobs=-1", "self.sampling"),
    "prompt logprobs counted twice": Mutant("scheduler", "seq.prompt_logprobs[stop - len(entries) : stop] =", "x ="),
    "prompt logprobs from the cache": Mutant("scheduler", "NO_MATCH if seq.prompt_logprobs is not None else ", ""),
    "slot returned too early": Mutant("scheduler", "if seq.num_in_flight == 0:", "if True:"),
    "admitted with a row in flight": Mutant("scheduler", "elif seq.num_in_flight:", "elif False:"),
    "slot released twice": Mutant("scheduler", "            domain.released = []\n", ""),
    "a row settles what is gone": Mutant("scheduler", "if seq.status == RUNNING:", "if True:"),
    "sealed when scheduled": Mutant("scheduler", "seq.num_settled = end\n", "seq.num_settled = seq.num_computed\n"),
    "sealed late": Mutant("scheduler", "= match.num_tokens + self.spec.block_size", "= self.spec.max_model_len"),
    "contents of failed rows kept": Mutant("scheduler", "if index in failed:", "if False:"),
    "run-ahead past the end": Mutant("scheduler", "and seq.num_known < seq.max_length", ""),
    "two stages, one sequence": Mutant("scheduler", "if pipelined and seq.num_in_flight:", "if False:"),
    "stage 0 reads an id too early": Mutant(
        "scheduler", "domain.in_flight[0][0] if domain.in_flight else self.step", "0"
    ),
    "hits computed again": Mutant("scheduler", "seq.num_prompt, match.num_tokens,", "seq.num_prompt, 0,"),
    "others pass a blocked head": Mutant("scheduler", "if placed is None:", "if False:"),
    "no priorities": Mutant("engine", "order=(frame.priority,", "order=(0,"),
    "oldest preempted": Mutant("scheduler", "victim = domain.running[-1][1]", "victim = domain.running[0][1]"),
    "cancelled request still counted": Mutant("scheduler", "elif status == WAITING:", "elif False:"),
    "finish of a resumed choice lost": Mutant("engine", "if seq.num_output >= seq.max_tokens or", "if"),
    "stop ids ignored": Mutant("scheduler", "if token_id in seq.stop_ids:", "if False:"),
    "earlier placement kept": Mutant("engine", "self._drop(self._jobs.get(frame.job, []))", "pass"),
    "cached prompt tokens told twice": Mutant("scheduler", "= seq.num_cached, REPORTED", "= [seq.num_cached] * 2"),
}
ORDER = ("sequence", "step_builder", "scheduler", "engine")  # each imports only what stands before it


def load(mutant: Mutant) -> type[Engine]:
    """The engine from source, one of its modules damaged."""
    folder = Path(step_builder.__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        for name in ORDER:
            text = (folder / f"{name}.py").read_text()
            if name == mutant.module:
                assert text.count(mutant.old) == 1, f"{mutant.old!r} occurs {text.count(mutant.old)} times in {name}.py"
                text = text.replace(mutant.old, mutant.new)
            module = ModuleType(f"phalanx.runtime.{name}")
            patch.setitem(sys.modules, module.__name__, module)
            exec(compile(text, f"{name}.py", "exec"), module.__dict__)
            if name == "step_builder":
                module.__dict__["MAX_PROMPT_LOGPROBS"] = step_builder.MAX_PROMPT_LOGPROBS
    engine_class: type[Engine] = module.__dict__["Engine"]
    return engine_class


def drive_all(engine_class: type[Engine]) -> None:
    for seed in range(3):
        for config in CONFIGS.values():
            drive(Client(make_config(**config), engine_class), seed, num_operations=700)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_dies(name: str) -> None:
    engine_class = load(MUTANTS[name])
    with pytest.raises((AssertionError, PlanError, RuntimeError, LookupError)):
        drive_all(engine_class)


def test_undamaged_source_survives() -> None:
    drive_all(load(Mutant("engine", "class Engine:", "class Engine:")))
