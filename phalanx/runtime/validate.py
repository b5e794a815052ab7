"""The one check a request passes before anything is spent on it."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from phalanx.errors import InvalidRequestError, RequestTooLongError
from phalanx.runtime.sampling_params import SamplingParams

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What one request may ask of a deployment.

    Attributes:
        vocab_size: of the model; ids are below it.
        max_model_len: longest prompt + output, tokens.
        max_request_tokens: prompt + output the KV pool can hold for one sequence, tokens.
        has_tokenizer: stop strings can be found.
        num_tasks: that a request may name; 0 = the model has no task-level routing.
    """

    vocab_size: int
    max_model_len: int
    max_request_tokens: int
    has_tokenizer: bool = True
    num_tasks: int = 0


def validate_request(prompt_token_ids: Sequence[int], params: SamplingParams, limits: RequestLimits) -> SamplingParams:
    """Check a request against a deployment; `SamplingParams` has checked what needs no deployment.

    Returns:
        `params` with `max_tokens` set: where it was None, as many as fit; and with `task`, if the model has tasks.

    Raises:
        RequestTooLongError: the prompt leaves no room for a token, or prompt + max_tokens pass the limit.
        InvalidRequestError: an empty prompt, an id outside the vocabulary, stop strings without a tokenizer, a task
            that the model has not.

    Cost: O(prompt), three passes in C.
    """
    _check_prompt(prompt_token_ids, limits.vocab_size)
    for name, token_ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        for token_id in token_ids:
            if token_id >= limits.vocab_size:
                raise InvalidRequestError(f"{name}: id {token_id} is not below the vocabulary ({limits.vocab_size})")
    if params.stop and not limits.has_tokenizer:
        raise InvalidRequestError("stop: this model has no tokenizer.json to find strings with; use stop_token_ids")
    return _fit(len(prompt_token_ids), _with_task(params, limits.num_tasks), limits)


def _with_task(params: SamplingParams, num_tasks: int) -> SamplingParams:
    if params.task is None:
        return msgspec.structs.replace(params, task=0) if num_tasks else params
    if not num_tasks:
        raise InvalidRequestError(f"task ({params.task}): this model has no tasks (0); leave the field out")
    if params.task >= num_tasks:
        raise InvalidRequestError(f"task ({params.task}) is unknown; this model has tasks 0 to {num_tasks - 1}")
    return params


def _check_prompt(prompt_token_ids: Sequence[int], vocab_size: int) -> None:
    if not len(prompt_token_ids):
        raise InvalidRequestError("prompt_token_ids is empty; send at least one id")
    # Whole-list passes in C; the offender is looked up only when there is one.
    are_ints = set(map(type, prompt_token_ids)) == {int}
    if are_ints and min(prompt_token_ids) >= 0 and max(prompt_token_ids) < vocab_size:
        return
    for i, token_id in enumerate(prompt_token_ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"prompt_token_ids[{i}] ({token_id!r:.80}) must be an integer from 0 to {vocab_size - 1}"
            )


def _fit(num_prompt: int, params: SamplingParams, limits: RequestLimits) -> SamplingParams:
    limit = min(limits.max_model_len, limits.max_request_tokens)
    bound = "max_model_len" if limit == limits.max_model_len else "the KV pool"
    room = limit - num_prompt
    if room < 1:
        raise RequestTooLongError(
            f"the prompt has {num_prompt} tokens; prompt and output together are at most {limit} ({bound}), "
            f"so send at most {limit - 1}"
        )
    asked = max(params.max_tokens or 1, params.min_tokens)
    if asked > room:
        name = "min_tokens" if params.max_tokens is None else "max_tokens"
        raise RequestTooLongError(
            f"the prompt ({num_prompt} tokens) and {name} ({asked}) are {num_prompt + asked} tokens, over {limit} "
            f"({bound}); the largest {name} that fits is {room}"
        )
    return params if params.max_tokens is not None else msgspec.structs.replace(params, max_tokens=room)


def validate_request_id(request_id: str) -> str:
    """A client's request id, as it is.

    Raises:
        InvalidRequestError: not 1 to 128 characters of `A-Z a-z 0-9 . _ : -`.
    """
    if not isinstance(request_id, str) or not _REQUEST_ID.fullmatch(request_id):
        raise InvalidRequestError(f"request_id ({request_id!a:.80}) must be 1 to 128 characters of A-Z a-z 0-9 . _ : -")
    return request_id


def draw_seed(rng: random.Random) -> int:
    """A seed for a request that brought none: unsigned 64-bit. Drawn once, then kept, so a resume samples the same."""
    return rng.getrandbits(64)
