"""A step's result on its way from the device to the engine."""

import time

import torch
from torch import Tensor

from phalanx.kernels.sample import TopLogprobs
from phalanx.runtime.frames import TokenLogprobs
from phalanx.runtime.plan import StepPlan, StepResult
from phalanx.runtime.sampler import Sampled
from phalanx.runtime.slot_table import SampleRows


class PendingResult:
    """A step that is launched; `wait` gives its result. On CUDA the copy to the host is already under way."""

    def __init__(self, plan: StepPlan, dp_rank: int, rows: SampleRows, sampled: Sampled, started: float) -> None:
        self._plan, self._dp_rank, self._rows, self._started = plan, dp_rank, rows, started
        self._token_ids, self._failed = to_host(sampled.token_ids), to_host(sampled.failed)
        self._logprob_rows = sampled.logprob_rows
        self._logprobs = None if sampled.logprobs is None else _to_host(sampled.logprobs)
        self._prompt = [(_to_host(values), to_host(targets)) for values, targets in sampled.prompt_logprobs]
        self._event = torch.cuda.Event() if sampled.token_ids.is_cuda else None
        if self._event is not None:
            self._event.record()

    @property
    def is_ready(self) -> bool:
        """Whether `wait` will not block."""
        return self._event is None

    def wait(self) -> StepResult:
        """Block until the step's ids are on the host."""
        if self._event is not None:
            self._event.synchronize()
        logprobs: list[TokenLogprobs | None] = []
        ids: list[int] = self._token_ids.tolist()
        if self._logprobs is not None:
            logprobs = [None] * len(ids)
            entries = _entries(self._logprobs, [ids[row] for row in self._logprob_rows])
            for row, entry in zip(self._logprob_rows, entries, strict=True):
                logprobs[row] = entry
        prompt = [
            (part.slot, _entries(values, targets.tolist()))
            for part, (values, targets) in zip(self._rows.prompt, self._prompt, strict=True)
        ]
        failed = torch.nonzero(self._failed).view(-1).tolist()
        return StepResult(
            self._plan.step,
            self._plan.generation,
            self._dp_rank,
            self._rows.slots.tolist(),
            ids,
            failed,
            logprobs,
            prompt,
            time.perf_counter() - self._started,
        )


def to_host(x: Tensor) -> Tensor:
    """Start copying a device tensor to the host; `x` itself on a CPU.

    Only a pinned target makes the copy asynchronous: into pageable memory the host would wait for the whole step.
    """
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _to_host(values: TopLogprobs) -> TopLogprobs:
    return TopLogprobs(*(to_host(column) for column in values))


def _entries(values: TopLogprobs, token_ids: list[int]) -> list[TokenLogprobs]:
    columns = (values.logprobs, values.ranks, values.top_ids, values.top_logprobs)
    logprobs, ranks, ids, tops = (column.tolist() for column in columns)
    return [TokenLogprobs(*entry) for entry in zip(token_ids, logprobs, ranks, ids, tops, strict=True)]
