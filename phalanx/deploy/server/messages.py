"""Protobuf messages to and from what the runtime works with."""

from collections.abc import Iterator, Sequence

from google.protobuf.duration_pb2 import Duration

from phalanx.deploy.server import phalanx_pb2 as pb
from phalanx.errors import InvalidRequestError
from phalanx.runtime.controller.jobs import Choice, Job, OnDisconnect
from phalanx.runtime.frames import TokenLogprobs
from phalanx.runtime.output import Delta
from phalanx.runtime.sampling_params import SamplingParams
from phalanx.runtime.tokenizer import Prompt

REASONS = {
    "stop": pb.STOP,
    "length": pb.LENGTH,
    "cancelled": pb.CANCELLED,
    "deadline": pb.DEADLINE,
    "error": pb.ERROR,
}
STATES = {"queued": pb.QUEUED, "running": pb.RUNNING, "finished": pb.FINISHED}
ON_DISCONNECT: dict[int, OnDisconnect] = {
    pb.CANCEL: "cancel",
    pb.CANCEL_AFTER_GRACE: "cancel_after_grace",
    pb.DETACH: "detach",
}
SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "task",
)
STOPPING_FIELDS = ("max_tokens", "min_tokens", "ignore_eos")
OUTPUT_FIELDS = ("logprobs", "prompt_logprobs", "skip_special_tokens")


def sampling_params(request: pb.SubmitRequest) -> SamplingParams:
    """The parameters of a request; what is unset keeps its default.

    Raises:
        InvalidRequestError: a field is outside its range.
    """
    given: dict[str, object] = {}
    for message, names in (
        (request.sampling, SAMPLING_FIELDS),
        (request.stopping, STOPPING_FIELDS),
        (request.output, OUTPUT_FIELDS),
    ):
        given |= {name: getattr(message, name) for name in names if message.HasField(name)}
    if request.sampling.HasField("num_choices"):
        given["n"] = request.sampling.num_choices
    logit_bias = {entry.token_id: entry.bias for entry in request.sampling.logit_bias}
    if len(logit_bias) != len(request.sampling.logit_bias):
        raise InvalidRequestError("logit_bias names a token id twice; send one bias per id")
    return SamplingParams(
        logit_bias=logit_bias,
        stop=tuple(request.stopping.stop),
        stop_token_ids=tuple(request.stopping.stop_token_ids),
        **given,  # type: ignore[arg-type]
    )


def prompt(request: pb.SubmitRequest) -> Prompt:
    """The prompt in the form it came in.

    Raises:
        InvalidRequestError: there is none.
    """
    match request.WhichOneof("prompt"):
        case "prompt_token_ids":
            return list(request.prompt_token_ids.ids)
        case "prompt_text":
            return request.prompt_text
        case "prompt_chat":
            return [{"role": message.role, "content": message.content} for message in request.prompt_chat.messages]
        case _:
            raise InvalidRequestError("no prompt; set prompt_token_ids, prompt_text or prompt_chat")


def seconds(duration: Duration) -> float:
    """A deadline in seconds.

    Raises:
        InvalidRequestError: not positive.
    """
    value: float = duration.seconds + duration.nanos / 1e9
    if value <= 0:
        raise InvalidRequestError(f"deadline ({value:g} s) must be positive; leave it out for none")
    return value


def on_disconnect(request: pb.SubmitRequest, default: OnDisconnect) -> OnDisconnect:
    """What happens when the last reader leaves.

    Raises:
        InvalidRequestError: a value this version does not know.
    """
    if request.on_disconnect == pb.ON_DISCONNECT_UNSPECIFIED:
        return default
    if request.on_disconnect not in ON_DISCONNECT:
        raise InvalidRequestError(f"on_disconnect ({request.on_disconnect}) is not one of {list(ON_DISCONNECT)}")
    return ON_DISCONNECT[request.on_disconnect]


def positions(given: Sequence[int], num_choices: int) -> list[int]:
    """One start per choice: where there are fewer than choices, the last one holds for the rest; none = 0."""
    last = given[-1] if given else 0
    return [*given[:num_choices], *[last] * (num_choices - len(given))]


def job(found: Job, *, with_output: bool) -> pb.Job:
    """State of a job, with all output so far or with the finishes alone."""
    message = pb.Job(request_id=found.request.request_id, state=STATES[found.state], seed=found.request.seed)
    for index, choice in enumerate(found.choices):
        result = message.choices.add(choice=index)
        if choice.finish is not None:
            result.finish.CopyFrom(finish(found, choice))
        if with_output:
            result.token_ids.extend(choice.output.token_ids)
            result.text = choice.output.text
            result.logprobs.extend(logprobs(choice.output.logprobs))
            result.prompt_logprobs.extend(logprobs(choice.prompt_logprobs or ()))
    return message


def chunk(found: Job, index: int, delta: Delta) -> pb.Chunk:
    """One piece of a choice."""
    choice = found.choices[index]
    message = pb.Chunk(
        choice=index,
        first_position=delta.first_position,
        token_ids=delta.token_ids,
        text_delta=delta.text_delta,
        text_offset=delta.text_offset,
        logprobs=logprobs(delta.logprobs or ()),
    )
    if delta.first_position == 0 and choice.prompt_logprobs is not None:
        message.prompt_logprobs.extend(logprobs(choice.prompt_logprobs))
    if delta.finish is not None:
        message.finish.CopyFrom(finish(found, choice))
    return message


def state_chunk(found: Job) -> pb.Chunk:
    """Says that the job is alive, and where it is in its life."""
    return pb.Chunk(state=STATES[found.state])


def finish(found: Job, choice: Choice) -> pb.Finish:
    """How a choice ended."""
    ended = choice.finish
    assert ended is not None
    return pb.Finish(
        reason=REASONS[ended.reason],
        stop_match=ended.stop_match,
        error=ended.error,
        usage=pb.Usage(
            prompt_tokens=ended.num_prompt_tokens,
            cached_tokens=ended.num_cached_tokens,
            output_tokens=ended.num_output_tokens,
        ),
        seed=found.request.seed,
    )


def logprobs(entries: Sequence[TokenLogprobs]) -> Iterator[pb.Logprob]:
    """Log-probabilities, one message per token."""
    for entry in entries:
        yield pb.Logprob(
            token_id=entry.token_id,
            logprob=entry.logprob,
            rank=entry.rank,
            top_ids=entry.top_ids,
            top_logprobs=entry.top_logprobs,
        )
