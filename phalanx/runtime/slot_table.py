"""State of a rank, indexed by slot: what a `StepPlan` changes and a `ForwardBatch` is built from.

Lengths and block tables live on the host (they follow from the plans alone); token ids live on the device, because the
last sampled id is not known to the host when the next step starts:

    tokens[slot, 0 : num_computed + 1]   prompt, output so far, and the id sampled last
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phalanx.kernels.types import AttnMeta
from phalanx.models.batch import ForwardBatch
from phalanx.moe.group import EpStep
from phalanx.runtime.kv.spec import KVSpec
from phalanx.runtime.plan import DomainPlan, PlanError, SlotInit, SlotSampling

Ints = NDArray[np.int32]

KEY_FACTOR, MAX_KEY = 0x9E3779B97F4A7C15, 2**62 - 1
"""Spreads seeds over the keys of `EpStep`; any odd number would do."""


@dataclass(frozen=True, slots=True)
class PromptRows:
    """A chunk that wants prompt logprobs: `count` logits from `first_logit` on, about prompt tokens `start + 1 ...`."""

    slot: int
    start: int
    count: int
    first_row: int
    first_logit: int


class SampleRows(NamedTuple):
    """Which rows of the step's logits are sampled: the first N, in plan order; prompt rows follow.

    Attributes:
        slots: [N] slot of each sampled row.
        lengths: [N] tokens of the sequence before the sampled one.
        prompt: chunks that want prompt logprobs.
    """

    slots: Ints
    lengths: Ints
    prompt: list[PromptRows]


class SlotTable:
    """All slots of one rank.

    Args:
        num_slots: sequences that may run at once.
        spec: KV pool of the rank's domain.
        device: where `tokens` lives.
        has_tasks: the model chooses experts by the task of a request.
    """

    def __init__(self, num_slots: int, spec: KVSpec, device: torch.device, *, has_tasks: bool = False) -> None:
        self.spec, self.device, self.has_tasks = spec, device, has_tasks
        self.num_computed = np.zeros(num_slots, np.int32)
        self.num_prompt = np.zeros(num_slots, np.int32)
        self.block_tables = np.zeros((num_slots, spec.max_blocks(spec.max_model_len) + 1), np.int32)
        self.is_admitted = np.zeros(num_slots, np.bool_)
        self.keys = np.zeros(num_slots, np.int64)
        self.tasks = np.zeros(num_slots, np.int64)
        self.sampling: dict[int, SlotSampling] = {}
        self._wants_prompt: set[int] = set()
        # One spare column: a step that runs ahead of a finish may sample one id past the limit.
        self.tokens = torch.zeros((num_slots, spec.max_model_len + 2), dtype=torch.int32, device=device)

    def apply(self, plan: DomainPlan) -> None:
        """Take the changes of a plan: releases, admissions, longer tables.

        Raises:
            PlanError: a slot, block id or length outside the rank's bounds.
        """
        for slot in plan.release:
            self._check_slot(slot, is_admitted=True)
            self.is_admitted[slot] = False
            self._wants_prompt.discard(slot)
        for init in plan.admit:
            self._check_slot(init.slot, is_admitted=False)
            self._admit(init)
        for slot, first, block_ids in ((e.slot, e.first_index, e.block_ids) for e in plan.extend):
            self._check_slot(slot, is_admitted=True)
            # The last column stays null: kernels may read one entry past the longest sequence.
            if not 0 <= first <= first + len(block_ids) < self.block_tables.shape[1]:
                raise PlanError(f"slot {slot}: blocks {first}..{first + len(block_ids) - 1} are outside its table")
            if block_ids and not 0 < min(block_ids) <= max(block_ids) < self.spec.num_blocks:
                raise PlanError(f"slot {slot}: block ids {block_ids} outside 1..{self.spec.num_blocks - 1}")
            self.block_tables[slot, first : first + len(block_ids)] = block_ids

    def build(self, rows: list[int], ep: EpStep | None = None) -> tuple[ForwardBatch, SampleRows]:
        """The step's batch, and its sampled rows. Advances `num_computed` of the rows' slots.

        Args:
            rows: flat triples (slot, num_tokens, sample), rows of one token first.
            ep: what the MoE layers are told; keys, scopes and tasks are filled in here. None for a dense model.

        Raises:
            PlanError: a row of a slot that is not in use or has another one, or tokens without a block.
        """
        slots, q_lens, sample = self._columns(rows)
        starts = self.num_computed[slots]
        ends = starts + q_lens
        cu_seqlens = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(q_lens, out=cu_seqlens[1:])
        num_tokens = int(cu_seqlens[-1])
        # position = start of the sequence's chunk + index within it
        positions = np.arange(num_tokens, dtype=np.int32) + np.repeat(starts - cu_seqlens[:-1], q_lens)
        token_slots = np.repeat(slots, q_lens)
        block_size = self.spec.block_size
        blocks = self.block_tables[token_slots, positions // block_size]
        if not blocks.all():  # the null block is nobody's
            raise PlanError(f"slots {sorted(set(token_slots[blocks == 0].tolist()))} have tokens beyond their blocks")
        slot_mapping = blocks.astype(np.int64) * block_size + positions % block_size
        max_seq_len = int(ends.max(initial=0))
        # One entry past the longest sequence stays readable (kernels.md section 3).
        tables = self.block_tables[slots, : self.spec.max_blocks(max_seq_len) + 1]
        token_index = token_slots.astype(np.int64) * self.tokens.shape[1] + positions
        chosen = np.flatnonzero(sample)
        prompt = self._prompt_rows(slots, starts, ends, cu_seqlens, len(chosen)) if self._wants_prompt else []
        prompt_rows = [np.arange(part.first_row, part.first_row + part.count) for part in prompt]
        logit_rows = np.concatenate([cu_seqlens[1:][chosen].astype(np.int64) - 1, *prompt_rows])
        sampled = SampleRows(slots[chosen], ends[chosen], prompt)
        self.num_computed[slots] = ends
        device = [self.to_device(array) for array in (positions, slot_mapping, cu_seqlens, ends, tables, logit_rows)]
        token_ids = self.tokens.view(-1)[self.to_device(token_index)]
        decodes = int((q_lens == 1).sum())
        meta = AttnMeta(device[2], device[3], device[4], decodes, int(q_lens.max(initial=0)), max_seq_len)
        if ep is not None:
            # The seed is drawn once per request and survives preemption and replicas, so the key does, too.
            keys = self.keys[token_slots] + positions
            ep = replace(ep, key_T=self.to_device(keys), scope_T=self.to_device(token_slots.astype(np.int64)))
            if self.has_tasks:
                ep = replace(ep, task_T=self.to_device(self.tasks[token_slots]))
        return ForwardBatch(token_ids, device[0], device[1], meta, device[5], num_tokens, ep), sampled

    def clear(self) -> None:
        """Forget all slots, whatever was planned for them."""
        self.is_admitted[:] = False
        self._wants_prompt.clear()

    def store(self, sampled: SampleRows, token_ids: Tensor) -> None:
        """Make sampled ids the next inputs of their slots; `token_ids` [N] on the device."""
        if len(sampled.slots):
            index = sampled.slots.astype(np.int64) * self.tokens.shape[1] + sampled.lengths
            self.tokens.view(-1)[self.to_device(index)] = token_ids.to(torch.int32)

    def _admit(self, init: SlotInit) -> None:
        num_tokens, slot = len(init.token_ids) // 4, init.slot
        if len(init.token_ids) % 4 or num_tokens > self.spec.max_model_len:
            raise PlanError(
                f"slot {slot}: {len(init.token_ids)} bytes are not 1..{self.spec.max_model_len} tokens of 4"
            )
        if not (0 <= init.num_computed_tokens < num_tokens and 0 < init.num_prompt_tokens <= num_tokens):
            raise PlanError(
                f"slot {slot}: {init.num_computed_tokens} tokens computed and {init.num_prompt_tokens} of the prompt "
                f"do not fit {num_tokens} tokens"
            )
        self.sampling[slot] = init.sampling
        self.keys[slot] = ((init.sampling.seed + init.sampling.choice) * KEY_FACTOR) & MAX_KEY
        self.tasks[slot] = init.sampling.task
        self.is_admitted[slot] = True
        if init.sampling.prompt_logprobs >= 0:
            self._wants_prompt.add(slot)
        self.num_computed[slot] = init.num_computed_tokens
        self.num_prompt[slot] = init.num_prompt_tokens
        self.block_tables[slot] = 0
        ids = np.frombuffer(init.token_ids, "<u4").astype(np.int32)
        self.tokens[slot, :num_tokens].copy_(self.to_device(ids))

    def _check_slot(self, slot: int, *, is_admitted: bool) -> None:
        if not 0 <= slot < len(self.is_admitted):
            raise PlanError(f"slot {slot} is not one of {len(self.is_admitted)}")
        if self.is_admitted[slot] != is_admitted:
            raise PlanError(f"slot {slot} is {'not in use' if is_admitted else 'in use already'}")

    def _columns(self, rows: list[int]) -> Ints:
        """Slots, lengths and sample flags [3, S] of a step's rows, all of them legal."""
        if len(rows) % 3:
            raise PlanError(f"{len(rows)} integers are no triples of (slot, num_tokens, sample)")
        columns = np.asarray(rows, np.int32).reshape(-1, 3).T
        slots, q_lens, _ = columns
        in_range = 0 <= slots.min(initial=0) <= slots.max(initial=0) < len(self.is_admitted)
        if not in_range or not self.is_admitted[slots].all():
            raise PlanError(f"slots {slots.tolist()} have work; in use are {np.flatnonzero(self.is_admitted).tolist()}")
        if np.bincount(slots, minlength=1).max() > 1:
            raise PlanError(f"slots {slots.tolist()} have work, one of them twice")
        lengths = self.num_computed[slots] + q_lens
        if q_lens.min(initial=1) < 1 or lengths.max(initial=0) > self.spec.max_model_len:
            raise PlanError(f"rows of {q_lens.tolist()} tokens end at {lengths.tolist()} of {self.spec.max_model_len}")
        if ((q_lens[1:] == 1) & (q_lens[:-1] > 1)).any():
            raise PlanError(f"rows of {q_lens.tolist()} tokens: those of one token come first")
        return columns

    def _prompt_rows(
        self, slots: Ints, starts: Ints, ends: Ints, cu_seqlens: Ints, num_sampled: int
    ) -> list[PromptRows]:
        prompt, first_logit = [], num_sampled
        for row, slot in enumerate(slots.tolist()):
            # The logits at position p are about token p + 1; the last prompt position is about the output.
            count = min(int(ends[row]), int(self.num_prompt[slot]) - 1) - int(starts[row])
            if slot in self._wants_prompt and count > 0:
                prompt.append(PromptRows(slot, int(starts[row]), count, int(cu_seqlens[row]), first_logit))
                first_logit += count
        return prompt

    def to_device(self, array: NDArray[np.generic]) -> Tensor:
        """A host array on the device, without waiting for the copy."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cpu":
            return tensor
        # Pinned memory of torch's caching allocator is not reused before this copy has run.
        return tensor.pin_memory().to(self.device, non_blocking=True)
