"""Logits to token ids, for the rows of one step.

Order of work (SamplingParams): logit_bias, penalties, min_tokens mask, then the `sample` op. Everything a row needs
follows from its slot and its token ids, so a resumed request continues the same stream.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from phalanx.kernels import registry
from phalanx.kernels.sample import TopLogprobs, top_logprobs
from phalanx.runtime.plan import SlotSampling
from phalanx.runtime.slot_table import PromptRows, SampleRows, SlotTable


class Sampled(NamedTuple):
    """Result of a step's sampling, on the device.

    Attributes:
        token_ids: [N] int64.
        failed: [N] bool, the row's logits held NaN or infinity.
        logprobs: of the sampled rows that asked (`logprob_rows`, host), as many as the most demanding wants; or None.
        prompt_logprobs: per entry of `SampleRows.prompt`, with the ids they are about.
    """

    token_ids: Tensor
    failed: Tensor
    logprobs: TopLogprobs | None
    logprob_rows: list[int]
    prompt_logprobs: list[tuple[TopLogprobs, Tensor]]


class Sampler:
    """Bound once per rank; `sample` is called once per step on every rank that holds full logits."""

    def __init__(self, table: SlotTable, choose: Mapping[str, str]) -> None:
        self._table = table
        self._sample = registry.bind("sample", device=table.device, dtype=torch.float32, choose=choose)

    def sample(self, logits: Tensor, rows: SampleRows) -> Sampled:
        """Choose the next id of each sampled row.

        Args:
            logits: [N + prompt rows, V] fp32; the first N rows are overwritten.
            rows: which slot each row belongs to.
        """
        count = len(rows.slots)
        params = [self._table.sampling[slot] for slot in rows.slots.tolist()]
        prompt = [self._prompt_logprobs(logits, part) for part in rows.prompt]
        logits = logits[:count]
        if not count:
            empty = logits.new_zeros(0, dtype=torch.int64)
            return Sampled(empty, empty.bool(), None, [], prompt)
        asked = [row for row, sampling in enumerate(params) if sampling.logprobs >= 0]
        raw = logits[asked] if asked else None
        for row, sampling in enumerate(params):
            if _is_adjusted(sampling):
                self._adjust(logits[row], sampling, int(rows.slots[row]), int(rows.lengths[row]))
        best, token_ids = logits.max(-1)  # the first of equal maxima, documented for both devices
        if any(sampling.temperature for sampling in params):
            # -1 = a failed row; its id is void, but it is the input of a step that is planned already.
            token_ids = self._sample(logits, *self._columns(params, rows)).clamp_(min=0)
        logprobs = None
        if raw is not None:
            logprobs = top_logprobs(raw, token_ids[asked], max(params[row].logprobs for row in asked))
        return Sampled(token_ids, ~torch.isfinite(best), logprobs, asked, prompt)

    def _columns(self, params: list[SlotSampling], rows: SampleRows) -> list[Tensor]:
        outputs = rows.lengths - self._table.num_prompt[rows.slots]
        columns = (
            np.array([p.temperature for p in params], np.float32),
            np.array([p.top_k for p in params], np.int32),
            np.array([p.top_p for p in params], np.float32),
            np.array([p.min_p for p in params], np.float32),
            np.array([p.seed for p in params], np.uint64).view(np.int64),
            outputs.astype(np.int32),
            np.array([p.choice for p in params], np.int32),
        )
        return [self._table.to_device(column) for column in columns]

    def _adjust(self, logits: Tensor, sampling: SlotSampling, slot: int, length: int) -> None:
        """Apply bias, penalties and the min_tokens mask to one row [V] in place."""
        num_prompt = int(self._table.num_prompt[slot])
        tokens = self._table.tokens[slot, :length].long()
        if sampling.logit_bias:
            ids, values = zip(*sorted(sampling.logit_bias.items()), strict=True)
            index = self._table.to_device(np.array(ids, np.int64))
            logits[index] += self._table.to_device(np.array(values, np.float32))
        if sampling.repetition_penalty != 1.0:
            seen = logits[tokens]
            # An id that occurs twice is written twice with the same value.
            logits[tokens] = torch.where(
                seen > 0, seen / sampling.repetition_penalty, seen * sampling.repetition_penalty
            )
        if sampling.presence_penalty or sampling.frequency_penalty:
            output = tokens[num_prompt:]
            counts = torch.zeros_like(logits).index_add_(0, output, torch.ones_like(output, dtype=logits.dtype))
            logits -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
        if length - num_prompt < sampling.min_tokens:
            # A checkpoint may name an end-of-sequence id that its vocabulary lacks.
            banned = [token_id for token_id in sampling.stop_token_ids if token_id < len(logits)]
            logits[self._table.to_device(np.array(banned, np.int64))] = -torch.inf

    def _prompt_logprobs(self, logits: Tensor, part: PromptRows) -> tuple[TopLogprobs, Tensor]:
        targets = self._table.tokens[part.slot, part.start + 1 : part.start + 1 + part.count].long()
        wanted = self._table.sampling[part.slot].prompt_logprobs
        rows = logits[part.first_logit : part.first_logit + part.count]
        return top_logprobs(rows, targets, wanted), targets


def _is_adjusted(sampling: SlotSampling) -> bool:
    return bool(
        sampling.logit_bias
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.min_tokens
    )
