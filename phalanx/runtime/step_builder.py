"""The step of one dp rank while it is being planned."""

from typing import NamedTuple

from phalanx.runtime.plan import DomainPlan, Extend, SlotInit
from phalanx.runtime.sequence import Sequence

MAX_PROMPT_LOGPROBS = 256
"""Prompt tokens of a step over all requests with prompt_logprobs: each needs a row of fp32 logits."""


class Row(NamedTuple):
    """A row of a step in flight.

    Attributes:
        end: `num_computed` of the sequence after this row.
    """

    seq: Sequence
    end: int
    sample: bool


class StepBuilder:
    """Collects rows under the token budget; rows of one token come out first."""

    __slots__ = (
        "_chunk_rows",
        "_chunks",
        "_num_prompt_logprobs",
        "_single_rows",
        "_singles",
        "admit",
        "budget",
        "extend",
        "release",
    )

    def __init__(self, budget: int, release: list[int]) -> None:
        self.budget, self.release = budget, release
        self.admit: list[SlotInit] = []
        self.extend: list[Extend] = []
        self._num_prompt_logprobs = MAX_PROMPT_LOGPROBS
        self._singles: list[int] = []
        self._chunks: list[int] = []
        self._single_rows: list[Row] = []
        self._chunk_rows: list[Row] = []

    def take_decode(self, seq: Sequence) -> None:
        """Put the sequence's last token, known or still in flight, into the step."""
        self.budget -= 1
        seq.num_computed += 1
        seq.num_known += 1
        seq.num_in_flight += 1
        self._singles += (seq.slot, 1, 1)
        self._single_rows.append(Row(seq, seq.num_computed, True))

    def room(self, seq: Sequence) -> int:
        """How many of the sequence's next tokens `take_chunk` would take."""
        room = min(self.budget, seq.num_remaining)
        return room if seq.prompt_logprobs is None else min(room, self._num_prompt_logprobs)

    def take_chunk(self, seq: Sequence) -> int:
        """Put as many of the sequence's known tokens into the step as there is room for; returns how many."""
        num_tokens = self.room(seq)
        if not num_tokens:
            return 0
        self.budget -= num_tokens
        if seq.prompt_logprobs is not None:
            self._num_prompt_logprobs -= num_tokens
        seq.num_computed += num_tokens
        seq.num_in_flight += 1
        row = Row(seq, seq.num_computed, seq.num_computed == seq.num_known)
        seq.num_known += row.sample
        triple = (seq.slot, num_tokens, int(row.sample))
        if num_tokens == 1:
            self._singles += triple
            self._single_rows.append(row)
        else:
            self._chunks += triple
            self._chunk_rows.append(row)
        return num_tokens

    def build(self, num_settled: int) -> tuple[DomainPlan, list[Row]]:
        """The plan, and its rows in the same order; `num_settled` as in `DomainPlan`."""
        plan = DomainPlan(self.release, self.admit, self.extend, self._singles + self._chunks, num_settled)
        return plan, self._single_rows + self._chunk_rows
