"""Offline inference: the engine and ranks of a deployment without Ray and gRPC."""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from phalanx.errors import ConfigError, InvalidRequestError, ReplicaLostError, StepError
from phalanx.models.loading import read_config, resolve_path
from phalanx.parallel import rendezvous
from phalanx.parallel.mesh import MeshShape
from phalanx.runtime.engine import Engine
from phalanx.runtime.executor.executor import Executor
from phalanx.runtime.executor.inline import InlineExecutor
from phalanx.runtime.executor.processes import ProcessExecutor
from phalanx.runtime.frames import Abort, FinishReason, Place, TokenLogprobs, TokenRow
from phalanx.runtime.offline_config import resolve_offline
from phalanx.runtime.output import ChoiceOutput, choice_outputs
from phalanx.runtime.sampling_params import SamplingParams
from phalanx.runtime.tokenizer import Tokenizer, encode_prompt
from phalanx.runtime.validate import RequestLimits, draw_seed, validate_request

MAX_DATA = 1024
"""As `parallel.data` of a cluster file."""

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


@dataclass(slots=True)
class Choice:
    """One finished answer."""

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    stop_match: str | None = None
    logprobs: list[TokenLogprobs] | None = None


@dataclass(slots=True)
class RequestOutput:
    """All answers to one prompt; the shorthand attributes are those of the first.

    Attributes:
        prompt_token_ids: as the model saw them.
        choices: `n` of them, by number.
        seed: what reproduces this output.
        num_cached_tokens: prompt tokens the prefix cache served (of the first choice).
        prompt_logprobs: entry i belongs to prompt token i + 1; None unless asked for.
    """

    prompt_token_ids: list[int]
    choices: list[Choice]
    seed: int
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] | None = None

    @property
    def token_ids(self) -> list[int]:
        """Output ids of the first choice."""
        return self.choices[0].token_ids

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first choice ended."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """Log-probabilities of the first choice."""
        return self.choices[0].logprobs


@dataclass(slots=True)
class _Job:
    prompt: list[int]
    params: SamplingParams
    seed: int
    outputs: list[ChoiceOutput]
    unfinished: set[int]
    num_cached: int = 0
    prompt_logprobs: list[TokenLogprobs] | None = None
    errors: list[str] = field(default_factory=list)


class LLM:
    """A model on this machine; one rank runs in this process, more run as child processes.

    Args:
        path: Hugging Face checkpoint folder, or "tiny" for the embedded model.
        tensor, pipeline, data: sizes of the mesh.
        stage_layers: layers per pipeline stage; None = as even as possible.
        device: "auto", "cpu" or "cuda".
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        scheduler: max_batch_tokens, max_sequences, max_model_len.
        kv: num_blocks, block_size, prefix_cache, gpu_fraction.
        workers: threads (CPU threads per rank).
        moe: dispatch, exact, redundant_experts, node_size, on_rank_loss, rebalance, capacity.
        kernels: op name -> implementation name.

    Raises:
        ConfigError: the layout cannot work; raised before a rank starts.
        CheckpointError: the checkpoint is missing, damaged or unsupported.
        ReplicaLostError: a rank failed; its traceback is in the message.
    """

    def __init__(
        self,
        path: str,
        *,
        tensor: int = 1,
        pipeline: int = 1,
        data: int = 1,
        stage_layers: Sequence[int] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        scheduler: Mapping[str, Any] | None = None,
        kv: Mapping[str, Any] | None = None,
        workers: Mapping[str, Any] | None = None,
        moe: Mapping[str, Any] | None = None,
        kernels: Mapping[str, str] | None = None,
    ) -> None:
        folder = resolve_path(path)
        model = read_config(folder)
        self.config = resolve_offline(
            str(folder),
            model,
            MeshShape(pp=pipeline, dp=data, tp=tensor),
            stage_layers=stage_layers,
            device=device,
            dtype=dtype,
            scheduler=scheduler or {},
            kv=kv or {},
            workers=workers or {},
            moe=moe or {},
            kernels=kernels or {},
        )
        self.tokenizer = Tokenizer.from_folder(folder)
        self._rng = random.Random()
        self._jobs: dict[str, _Job] = {}
        self._count = 0
        self._ended = ""
        self._store, address = None, ""
        if self.config.shape.world_size > 1:
            self._store, address = rendezvous.host_store("127.0.0.1")
        self.engine = Engine(self.config, self._start(address), address, "lo" if address else "")

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts, together; results come in the order of the prompts.

        Args:
            prompts: one prompt or several; each is text, token ids, or chat messages ({"role", "content"}).
            params: for all, or one per prompt.

        Raises:
            InvalidRequestError: a prompt or parameter is out of its limits; nothing has run then.
            StepError: the model gave no number for one of the prompts; the others' answers are lost with it.
            ReplicaLostError: a rank died, now or before, or this LLM was closed.
        """
        self._check_live()
        listed = _as_list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(listed)
        if len(each) != len(listed):
            raise InvalidRequestError(f"{len(each)} params for {len(listed)} prompts; give one, or one per prompt")
        checked = [self._check(prompt, one) for prompt, one in zip(listed, each, strict=True)]
        names = [self._submit(ids, one) for ids, one in checked]
        try:
            while any(self._jobs[name].unfinished for name in names):
                for row in self.engine.step(1.0, now=time.monotonic()):
                    self._take(row)
        except BaseException as error:
            for name in names:
                self.engine.abort(Abort(name, 0))
                del self._jobs[name]
            if isinstance(error, ReplicaLostError):
                self._end(error)
            raise
        jobs = [self._jobs.pop(name) for name in names]
        return [_result(job) for job in jobs]

    def scale(self, data: int) -> None:
        """Grow or shrink a mixture-of-experts model to `data` data-parallel ranks while it stays loaded.

        Raises:
            ConfigError: the size cannot be; with the reason.
            ReplicaLostError: a new rank failed, and the size is as before; or one that served, or this LLM was closed.
        """
        self._check_live()
        if type(data) is not int or not 1 <= data <= MAX_DATA:
            raise ConfigError(f"data ({data!r}) must be an integer from 1 to {MAX_DATA}")
        self._count += 1
        try:
            op = self.engine.scale(f"scale-{self._count}", data, time.monotonic())
            while not op.is_over or self.engine.has_work:
                for row in self.engine.step(0.05, now=time.monotonic()):
                    self._take(row)
        except ReplicaLostError as error:
            self._end(error)
            raise
        if op.phase == "ABORTED":
            raise ReplicaLostError(f"scaling to data {data} was undone: {op.detail}")

    def close(self) -> None:
        """End the ranks."""
        self._ended = "it was closed"
        self.engine.executor.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_live(self) -> None:
        if self._ended:
            raise ReplicaLostError(f"this LLM has ended ({self._ended}); make a new one")

    def _end(self, error: ReplicaLostError) -> None:
        self.close()
        self._ended = str(error)

    def _start(self, address: str) -> Executor:
        if not address:
            return InlineExecutor(self.config.rank_specs("", [""])[0])
        return ProcessExecutor(self.config.shape.world_size, lambda nodes: self.config.rank_specs(address, nodes, "lo"))

    def _check(self, prompt: Prompt, params: SamplingParams) -> tuple[list[int], SamplingParams]:
        ids = encode_prompt(self.tokenizer, prompt)
        limits = RequestLimits(
            vocab_size=self.config.model.vocab_size,
            max_model_len=self.config.kv.max_model_len,
            max_request_tokens=self.engine.limit,
            has_tokenizer=self.tokenizer is not None,
            num_tasks=self.config.model.num_tasks,
        )
        return ids, validate_request(ids, params, limits)

    def _submit(self, ids: list[int], params: SamplingParams) -> str:
        name = f"offline-{self._count}"
        self._count += 1
        seed = draw_seed(self._rng) if params.seed is None else params.seed
        outputs = choice_outputs(self.tokenizer, params)
        self._jobs[name] = _Job(ids, params, seed, outputs, set(range(params.n)))
        packed = b"".join(token.to_bytes(4, "little") for token in ids)
        self.engine.place(Place(name, 0, packed, [b""] * params.n, params, seed))
        return name

    def _take(self, row: TokenRow) -> None:
        job = self._jobs.get(row.job)
        if job is None or row.choice not in job.unfinished:
            return
        if row.num_cached_tokens >= 0 and row.choice == 0:
            job.num_cached = row.num_cached_tokens
        if row.prompt_logprobs is not None:
            job.prompt_logprobs = row.prompt_logprobs
        if row.error is not None:
            job.errors.append(row.error)
        delta = job.outputs[row.choice].accept(row.first_position, row.token_ids, row.logprobs, row.finish)
        if delta.finish is not None:
            job.unfinished.discard(row.choice)
            if row.finish is None:  # a stop string: the engine does not know yet
                self.engine.abort(Abort(row.job, row.epoch, row.choice))


def _result(job: _Job) -> RequestOutput:
    if job.errors:
        raise StepError(job.errors[0])
    choices = []
    for out in job.outputs:
        logprobs = None if job.params.logprobs is None else out.logprobs
        choices.append(Choice(list(out.token_ids), out.text, out.finish or "length", out.stop_match, logprobs))
    return RequestOutput(job.prompt, choices, job.seed, job.num_cached, job.prompt_logprobs)


def _as_list(prompts: Any) -> list[Prompt]:
    # One prompt is a text, a list of ids, or a list of messages; several are a list of those.
    if not isinstance(prompts, Sequence):
        raise InvalidRequestError(f"prompts ({type(prompts).__name__}) must be a prompt or a list of prompts")
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int | Mapping)):
        return [prompts]
    return list(prompts)
