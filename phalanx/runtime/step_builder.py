"""The step of one dp rank while it is being planned."""

from typing import NamedTuple

from phalanx.runtime.plan import DomainPlan, Extend, SlotInit
from phalanx.runtime.sequence import Sequence


class Row(NamedTuple):
    """A row of a step in flight.

    Attributes:
        life: of the sequence when planned; a preempted sequence's row settles nothing.
    """

    seq: Sequence
    num_tokens: int
    sample: bool
    life: int


class StepBuilder:
    """Collects rows under the token budget; decodes come out before chunks."""

    __slots__ = ("_chunk_rows", "_chunks", "_decode_rows", "_decodes", "admit", "budget", "extend", "release")

    def __init__(self, budget: int, release: list[int]) -> None:
        self.budget, self.release = budget, release
        self.admit: list[SlotInit] = []
        self.extend: list[Extend] = []
        self._decodes: list[int] = []
        self._chunks: list[int] = []
        self._decode_rows: list[Row] = []
        self._chunk_rows: list[Row] = []

    def take(self, seq: Sequence, num_tokens: int, sample: bool) -> None:
        """Put the sequence's next `num_tokens` tokens into the step."""
        self.budget -= num_tokens
        seq.num_computed += num_tokens
        seq.num_in_flight += 1
        if sample:
            seq.num_pending += 1
        if num_tokens == 1:
            self._decodes += (seq.slot, 1, int(sample))
            self._decode_rows.append(Row(seq, 1, sample, seq.life))
        else:
            self._chunks += (seq.slot, num_tokens, int(sample))
            self._chunk_rows.append(Row(seq, num_tokens, sample, seq.life))

    def build(self) -> tuple[DomainPlan, list[Row]]:
        """The plan, and its rows in the same order."""
        plan = DomainPlan(self.release, self.admit, self.extend, self._decodes + self._chunks)
        return plan, self._decode_rows + self._chunk_rows
