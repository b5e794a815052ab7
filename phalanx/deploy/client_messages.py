"""What the client returns, and how it becomes and comes from protobuf messages."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from phalanx.deploy import client_scale
from phalanx.deploy.client_scale import ReplicaScale
from phalanx.deploy.server import phalanx_pb2 as pb
from phalanx.errors import InvalidRequestError
from phalanx.runtime.frames import FinishReason, TokenLogprobs
from phalanx.runtime.sampling_params import SamplingParams

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
JobState = Literal["queued", "running", "finished"]

_REASONS: Mapping[int, FinishReason] = {
    pb.STOP: "stop",
    pb.LENGTH: "length",
    pb.CANCELLED: "cancelled",
    pb.DEADLINE: "deadline",
    pb.ERROR: "error",
}
_STATES: Mapping[int, JobState] = {pb.QUEUED: "queued", pb.RUNNING: "running", pb.FINISHED: "finished"}
_SAMPLING_FIELDS = (
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
_STOPPING_FIELDS = ("max_tokens", "min_tokens", "ignore_eos")
_OUTPUT_FIELDS = ("logprobs", "prompt_logprobs", "skip_special_tokens")
_DEFAULT = SamplingParams()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one choice; `cached_tokens` of the prompt came from a prefix cache."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """New output of one choice.

    Attributes:
        position: index of `token_ids[0]` in the choice's output.
        text: goes after the first `text_offset` UTF-8 bytes of the choice's text.
        finish_reason: set on the last chunk of a choice; `stop_match`, `error`, `usage`, `seed` come with it.
        error: sentence, with finish_reason "error".
        prompt_logprobs: entry i belongs to prompt token i + 1; with the first chunk of a choice.
    """

    choice: int
    position: int
    token_ids: tuple[int, ...]
    text: str
    text_offset: int
    finish_reason: FinishReason | None = None
    stop_match: str | None = None
    error: str | None = None
    usage: Usage | None = None
    seed: int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceResult:
    """All of a choice so far; fields as in `Chunk`."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    stop_match: str | None = None
    error: str | None = None
    usage: Usage | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the server knows it; `seed` is the one in use, given or drawn."""

    request_id: str
    state: JobState
    seed: int
    choices: tuple[ChoiceResult, ...]


@dataclass(frozen=True, slots=True)
class JobCounts:
    """Jobs by state; finished ones count while they are kept."""

    queued: int
    running: int
    finished: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """One replica; fields as in phalanx.proto."""

    replica: int
    state: str
    incarnation: int
    ranks: tuple[str, ...]
    num_jobs: int
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_total_blocks: int
    block_size: int
    startup_s: Mapping[str, float]
    max_model_len: int
    max_request_tokens: int
    error: str | None
    num_preemptions: int
    prefix_queries: int
    prefix_hits: int
    num_generated_tokens: int
    data: int
    scale: ReplicaScale | None
    expert_load: tuple[int, ...]
    num_dropped: int
    num_moved: int
    num_single_experts: int


@dataclass(frozen=True, slots=True)
class ClusterState:
    """The service: its version, model, jobs and replicas."""

    version: str
    model: str
    draining: bool
    jobs: JobCounts
    replicas: tuple[ReplicaStatus, ...]


def submit_request(
    prompt: Prompt,
    params: SamplingParams | None,
    *,
    request_id: str,
    model: str | None,
    deadline_s: float | None,
    priority: int,
    on_disconnect: pb.OnDisconnect,
) -> pb.SubmitRequest:
    """The message of `generate` and `submit`; what is at its default stays unset.

    Raises:
        InvalidRequestError: a prompt of another form, or a value no message can carry.
    """
    params = params or _DEFAULT
    request = pb.SubmitRequest(request_id=request_id, model=model, on_disconnect=on_disconnect)
    try:
        _set_prompt(request, prompt)
        for message, names in (
            (request.sampling, _SAMPLING_FIELDS),
            (request.stopping, _STOPPING_FIELDS),
            (request.output, _OUTPUT_FIELDS),
        ):
            for name in names:
                if getattr(params, name) != getattr(_DEFAULT, name):
                    setattr(message, name, getattr(params, name))
        if params.n != 1:
            request.sampling.num_choices = params.n
        for token_id, bias in params.logit_bias.items():
            request.sampling.logit_bias.add(token_id=token_id, bias=bias)
        request.stopping.stop.extend(params.stop)
        request.stopping.stop_token_ids.extend(params.stop_token_ids)
        if priority:
            request.priority = priority
        if deadline_s is not None:
            request.deadline.FromNanoseconds(round(deadline_s * 1e9))
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequestError(f"the request cannot be sent: {error}") from error
    return request


def _set_prompt(request: pb.SubmitRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.prompt_text = prompt
    elif len(prompt) and isinstance(prompt[0], Mapping):
        for message in prompt:
            if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
                raise InvalidRequestError(f"chat message {message!r:.80} must have role and content, and nothing else")
            request.prompt_chat.messages.add(role=message["role"], content=message["content"])
    else:
        request.prompt_token_ids.SetInParent()
        request.prompt_token_ids.ids.extend(prompt)


def chunk(message: pb.Chunk) -> Chunk:
    """A chunk of the stream."""
    ends = message.HasField("finish")
    return Chunk(
        choice=message.choice,
        position=message.first_position,
        token_ids=tuple(message.token_ids),
        text=message.text_delta,
        text_offset=message.text_offset,
        seed=message.finish.seed if ends else None,
        logprobs=_logprobs(message.logprobs),
        prompt_logprobs=_logprobs(message.prompt_logprobs),
        **_finish(message.finish) if ends else {},
    )


def job(message: pb.Job) -> Job:
    """A job."""
    choices = tuple(
        ChoiceResult(
            token_ids=tuple(choice.token_ids),
            text=choice.text,
            logprobs=_logprobs(choice.logprobs),
            prompt_logprobs=_logprobs(choice.prompt_logprobs),
            **_finish(choice.finish) if choice.HasField("finish") else {},
        )
        for choice in message.choices
    )
    return Job(message.request_id, _STATES[message.state], message.seed, choices)


def job_counts(message: pb.JobCounts) -> JobCounts:
    """Jobs by state."""
    return JobCounts(message.queued, message.running, message.finished)


def cluster_state(message: pb.ClusterState) -> ClusterState:
    """The state of the service."""
    replicas = []
    for status in message.replicas:
        fields = {field.name: getattr(status, field.name) for field in status.DESCRIPTOR.fields}
        fields["ranks"], fields["expert_load"] = tuple(status.ranks), tuple(status.expert_load)
        fields["startup_s"] = dict(status.startup_s)
        fields["error"] = status.error if status.HasField("error") else None
        fields["scale"] = client_scale.part(status.scale) if status.HasField("scale") else None
        replicas.append(ReplicaStatus(**fields))
    jobs = job_counts(message.jobs)
    return ClusterState(message.version, message.model, message.draining, jobs, tuple(replicas))


def _finish(message: pb.Finish) -> dict[str, Any]:
    usage = message.usage
    return {
        "finish_reason": _REASONS[message.reason],
        "stop_match": message.stop_match if message.HasField("stop_match") else None,
        "error": message.error if message.HasField("error") else None,
        "usage": Usage(usage.prompt_tokens, usage.cached_tokens, usage.output_tokens),
    }


def _logprobs(messages: Iterable[pb.Logprob]) -> tuple[TokenLogprobs, ...] | None:
    entries = tuple(
        TokenLogprobs(entry.token_id, entry.logprob, entry.rank, list(entry.top_ids), list(entry.top_logprobs))
        for entry in messages
    )
    return entries or None
