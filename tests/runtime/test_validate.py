import random
from typing import Any

import pytest

from phalanx.errors import InvalidRequestError, RequestTooLongError
from phalanx.runtime.sampling_params import SamplingParams
from phalanx.runtime.validate import RequestLimits, draw_seed, validate_request, validate_request_id

LIMITS = RequestLimits(vocab_size=100, max_model_len=32, max_request_tokens=64)


@pytest.mark.parametrize("num_prompt", range(1, 32))
def test_the_longest_output_fits_and_one_more_does_not(num_prompt: int) -> None:
    prompt, room = [7] * num_prompt, 32 - num_prompt
    assert validate_request(prompt, SamplingParams(), LIMITS) == SamplingParams(max_tokens=room)
    exact = SamplingParams(max_tokens=room, min_tokens=room, temperature=0.5, stop=("x",))
    assert validate_request(prompt, exact, LIMITS) is exact
    for name in ("max_tokens", "min_tokens"):
        message = (
            rf"the prompt \({num_prompt} tokens\) and {name} \({room + 1}\) are 33 tokens, over 32 \(max_model_len\); "
            rf"the largest {name} that fits is {room}"
        )
        with pytest.raises(RequestTooLongError, match=message):
            validate_request(prompt, SamplingParams(**{name: room + 1}), LIMITS)


@pytest.mark.parametrize("num_prompt", [32, 33, 1000])
def test_a_prompt_without_room_for_a_token(num_prompt: int) -> None:
    with pytest.raises(RequestTooLongError, match=rf"has {num_prompt} tokens; .* at most 32 .*send at most 31"):
        validate_request([1] * num_prompt, SamplingParams(max_tokens=1), LIMITS)


def test_the_smaller_limit_counts_and_is_named() -> None:
    small = RequestLimits(vocab_size=100, max_model_len=32, max_request_tokens=16)
    assert validate_request([1] * 10, SamplingParams(), small).max_tokens == 6
    with pytest.raises(RequestTooLongError, match=r"over 16 \(the KV pool\); the largest max_tokens that fits is 6"):
        validate_request([1] * 10, SamplingParams(max_tokens=7), small)


def test_fields_are_kept() -> None:
    params = SamplingParams(seed=5, n=3, logit_bias={99: 1.0}, stop_token_ids=(99,), min_tokens=2)
    filled = validate_request([0, 99], params, LIMITS)
    assert filled.max_tokens == 30
    assert (filled.seed, filled.n, filled.logit_bias, filled.min_tokens) == (5, 3, {99: 1.0}, 2)


@pytest.mark.parametrize("bad", [-1, 100, 2**63, True, 1.0, "1", None, float("nan")])
def test_ids_outside_the_vocabulary(bad: Any) -> None:
    for prompt in ([bad], [0, 99, bad, bad]):
        with pytest.raises(InvalidRequestError, match=rf"prompt_token_ids\[{prompt.index(bad)}\] .*from 0 to 99"):
            validate_request(prompt, SamplingParams(), LIMITS)


@pytest.mark.parametrize("field", [{"logit_bias": {5: 1.0, 100: 1.0}}, {"stop_token_ids": (5, 100)}])
def test_parameters_outside_the_vocabulary(field: dict[str, Any]) -> None:
    (name,) = field
    with pytest.raises(InvalidRequestError, match=rf"{name}: id 100 is not below the vocabulary \(100\)"):
        validate_request([1], SamplingParams(**field), LIMITS)


def test_empty_prompt_and_stop_without_tokenizer() -> None:
    with pytest.raises(InvalidRequestError, match="prompt_token_ids is empty"):
        validate_request([], SamplingParams(), LIMITS)
    bare = RequestLimits(100, 32, 64, has_tokenizer=False)
    with pytest.raises(InvalidRequestError, match=r"stop: .* no tokenizer\.json .* use stop_token_ids"):
        validate_request([1], SamplingParams(stop=("x",)), bare)
    assert validate_request([1], SamplingParams(), bare).max_tokens == 31


@pytest.mark.parametrize("request_id", ["a", "job-1", "A.b_c:9-", "x" * 128])
def test_request_ids(request_id: str) -> None:
    assert validate_request_id(request_id) == request_id


@pytest.mark.parametrize("request_id", ["", "x" * 129, "a b", "a\n", "é", "a/b", "\ud800", None, 5])
def test_refused_request_ids(request_id: Any) -> None:
    with pytest.raises(InvalidRequestError, match="must be 1 to 128 characters of A-Z"):
        validate_request_id(request_id)


def test_seeds_are_unsigned_64_bit_and_follow_the_generator() -> None:
    seeds = [draw_seed(random.Random(i)) for i in range(200)]
    assert seeds == [draw_seed(random.Random(i)) for i in range(200)]
    assert 2**63 < max(seeds) < 2**64
    assert min(seeds) < 2**58
    assert all(SamplingParams(seed=seed).seed == seed for seed in seeds)


def test_tasks() -> None:
    """Set where the model has some, so that nobody behind has to know the default; refused where it has none."""
    plain = SamplingParams(max_tokens=3)
    some = RequestLimits(100, 32, 64, num_tasks=2)
    assert validate_request([1], plain, LIMITS) is plain
    assert [validate_request([1], SamplingParams(task=task), some).task for task in (None, 0, 1)] == [0, 0, 1]
    with pytest.raises(InvalidRequestError, match=r"task \(2\) is unknown; this model has tasks 0 to 1"):
        validate_request([1], SamplingParams(task=2), some)
    with pytest.raises(InvalidRequestError, match=r"task \(0\): this model has no tasks \(0\); leave the field out"):
        validate_request([1], SamplingParams(task=0), LIMITS)
