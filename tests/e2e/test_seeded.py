"""A seeded request gives the same tokens whatever else runs, on any layout, preempted or resumed. Runs in 22 s.

What "the same" is, a sampler in plain Python says, from transformers' logits and the seed.
"""

import contextlib
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from phalanx import LLM, SamplingParams
from phalanx.errors import ReplicaLostError
from phalanx.models.loading import resolve_path
from phalanx.runtime.frames import Place
from tests.support import oracle, tiny
from tests.support.engines import SHARING_CORES, forked_ranks

NUM_TOKENS = 40
SUBJECTS = {
    "plain": SamplingParams(seed=1),
    "cut": SamplingParams(seed=2**64 - 3, temperature=0.8, top_k=40, top_p=0.9),
    "penalized": SamplingParams(
        seed=3, temperature=1.4, min_p=0.02, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4
    ),
    "biased": SamplingParams(
        seed=4, logit_bias={300: 6.0, 400: 5.5, 500: -3.0}, min_tokens=25, stop_token_ids=(300, 301, 302)
    ),
}
SUBJECTS = {
    name: msgspec.structs.replace(params, max_tokens=NUM_TOKENS, ignore_eos=True) for name, params in SUBJECTS.items()
}
LAYOUTS: dict[str, dict[str, Any]] = {"one rank": {}, "tp 2": {"tensor": 2}, "pp 2": {"pipeline": 2}}
NUM_OTHERS = 31
PRESSURE = {"scheduler": {"max_batch_tokens": 32, "max_model_len": 96}, "kv": {"num_blocks": 15}}
PROMPT = random.Random(7).choices(range(3, 4000), k=21)


@pytest.fixture(scope="module")
def llms() -> Iterator[dict[str, LLM]]:
    """One per layout, ranks forked, for all tests of this file."""
    with contextlib.ExitStack() as stack:
        yield {layout: stack.enter_context(_llm(**arguments)) for layout, arguments in LAYOUTS.items()}


@pytest.fixture(scope="module")
def alone(llms) -> dict[str, list[int]]:
    """Each subject's tokens with nothing beside it, on one rank."""
    return {name: llms["one rank"].generate(PROMPT, params)[0].token_ids for name, params in SUBJECTS.items()}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.load_hf(resolve_path("tiny"))


def _llm(**arguments: Any) -> LLM:
    with forked_ranks():
        return LLM("tiny", **SHARING_CORES, **arguments)


def _others(rng: random.Random, count: int) -> list[tuple[list[int], SamplingParams]]:
    return [(rng.choices(range(3, 4000), k=rng.randrange(1, 60)), _random_params(rng)) for _ in range(count)]


def _random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.0, 1.3]),
        top_k=rng.choice([0, 0, 20]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        frequency_penalty=rng.choice([0.0, 0.3]),
        logit_bias=rng.choice([{}, {17: 2.0}]),
        seed=rng.choice([None, rng.getrandbits(64)]),
        max_tokens=rng.randrange(1, 60),
        ignore_eos=rng.random() < 0.5,
        logprobs=rng.choice([None, None, 3]),
        n=rng.choice([1, 1, 1, 2]),
    )


@pytest.mark.parametrize("subject", SUBJECTS)
def test_alone_it_is_what_its_parameters_promise(subject, alone, model):
    params = SUBJECTS[subject]
    assert alone[subject] == oracle.sample(model, PROMPT, params, params.seed)
    assert len(set(alone[subject])) > 5
    assert (len(alone[subject]) < NUM_TOKENS) == (subject == "biased"), "one ends by a stop id after min_tokens"


@pytest.mark.multi
@pytest.mark.parametrize("layout", LAYOUTS)
def test_among_31_others(layout, llms, alone):
    rng = random.Random(layout)
    batch = _others(rng, NUM_OTHERS + 1 - len(SUBJECTS))
    where = {name: rng.randrange(len(batch)) for name in SUBJECTS}
    for name, index in where.items():
        batch.insert(index, (PROMPT, SUBJECTS[name]))
    assert len(batch) == NUM_OTHERS + 1
    prompts, params = zip(*batch, strict=True)
    results = llms[layout].generate(list(prompts), list(params))
    got = {name: results[params.index(SUBJECTS[name])].token_ids for name in SUBJECTS}
    assert got == alone


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_preempted(subject, prefix_cache, alone):
    """Eight copies in a pool for three: whichever are preempted, all are equal."""
    pressure = {**PRESSURE, "kv": {**PRESSURE["kv"], "prefix_cache": prefix_cache}}
    with _llm(**pressure) as llm:
        results = llm.generate([PROMPT] * 8, SUBJECTS[subject])
        assert llm.engine.scheduler.num_preemptions > 0
    assert [result.token_ids for result in results] == [alone[subject]] * 8


@pytest.mark.multi
@pytest.mark.parametrize("layout", ["one rank", "pp 2"])
def test_resumed_from_what_was_emitted(layout, llms, alone):
    """Each subject from several points at once: nothing emitted yet, one token, more than a block, all but the last."""
    llm = llms[layout]
    emitted = {
        f"{name} from {cut}": alone[name][:cut] for name in SUBJECTS for cut in (0, 1, 11, 23, len(alone[name]) - 1)
    }
    rest = _resume(llm, {job: (job.partition(" ")[0], ids) for job, ids in emitted.items()})
    assert {job: emitted[job] + ids for job, ids in rest.items()} == {
        job: alone[job.partition(" ")[0]] for job in emitted
    }


@pytest.mark.multi
@pytest.mark.parametrize("killed", [0, 1])
def test_after_a_worker_was_killed(killed, llms, alone):
    """Half of the tokens come from a replica that dies, the others from one of another layout."""
    emitted: dict[str, list[int]] = {name: [] for name in SUBJECTS}
    with _llm(tensor=2) as llm:
        _place(llm, {name: (name, []) for name in SUBJECTS})
        while min(map(len, emitted.values())) < 15:
            for row in llm.engine.step(1.0):
                emitted[row.job] += row.token_ids
        os.kill(llm.engine.executor.ready[killed].pid, signal.SIGKILL)
        with pytest.raises(ReplicaLostError, match=f"rank {killed} .*died"):
            _collect(llm, emitted)
    unfinished = {name: (name, ids) for name, ids in emitted.items() if ids != alone[name]}
    assert len(unfinished) >= 3
    rest = _resume(llms["pp 2"], unfinished)
    assert {name: ids + rest.get(name, []) for name, ids in emitted.items()} == alone


def _collect(llm: LLM, emitted: dict[str, list[int]]) -> None:
    """Append what the engine emits until it has nothing to do."""
    while llm.engine.has_work:
        for row in llm.engine.step(1.0):
            emitted[row.job] += row.token_ids


def _place(llm: LLM, jobs: dict[str, tuple[str, list[int]]]) -> None:
    for job, (subject, ids) in jobs.items():
        params = SUBJECTS[subject]
        assert params.seed is not None
        llm.engine.place(Place(job, 1, _pack(PROMPT), [_pack(ids)], params, params.seed))


def _resume(llm: LLM, jobs: dict[str, tuple[str, list[int]]]) -> dict[str, list[int]]:
    """Place requests with the outputs they have; returns what each then adds. Nothing is left in the engine."""
    _place(llm, jobs)
    rest: dict[str, list[int]] = {job: [] for job in jobs}
    _collect(llm, rest)
    llm.engine.check()
    return rest


def _pack(token_ids: list[int]) -> bytes:
    return b"".join(token_id.to_bytes(4, "little") for token_id in token_ids)


@pytest.mark.multi
@pytest.mark.parametrize("layout", ["one rank", "tp 2"])
def test_choices_differ_and_repeat(layout, llms, alone, model):
    params = msgspec.structs.replace(SUBJECTS["cut"], n=3)
    results = llms[layout].generate([PROMPT, PROMPT], params)
    choices = [choice.token_ids for choice in results[0].choices]
    assert choices == [choice.token_ids for choice in results[1].choices]
    assert choices == [oracle.sample(model, PROMPT, params, params.seed, choice) for choice in range(3)]
    assert choices[0] == alone["cut"]
    assert len({tuple(ids) for ids in choices}) == 3


def test_a_seed_nobody_chose_repeats_too(llms):
    llm, params = llms["one rank"], SamplingParams(max_tokens=20, ignore_eos=True, n=2)
    first, second = llm.generate([PROMPT, PROMPT], params)
    assert first.seed != second.seed
    assert first.token_ids != second.token_ids
    again = llm.generate(PROMPT, msgspec.structs.replace(params, seed=first.seed))[0]
    assert again.seed == first.seed
    assert [choice.token_ids for choice in again.choices] == [choice.token_ids for choice in first.choices]
