"""A job: one request, its choices, and where it is. Rows of an engine enter a choice only in order of position."""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec

from phalanx.runtime.frames import FinishReason, Place, TokenLogprobs, TokenRow
from phalanx.runtime.output import ChoiceOutput, OutputError
from phalanx.runtime.sampling_params import SamplingParams

OnDisconnect = Literal["cancel", "cancel_after_grace", "detach"]
JobState = Literal["queued", "running", "finished"]


class JobRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A validated request.

    Attributes:
        request_id: chosen by the client; the key of an idempotent submit.
        digest: `body_digest` of what the client asked for, before anything was filled in.
        prompt_token_ids: u32 little-endian, packed.
        params: as validated; `max_tokens` is set.
        seed: always set, so that every job can be resumed exactly.
        priority: smaller runs first.
        deadline_s: seconds after arrival at which the job ends wherever it is; None = never.
        on_disconnect: what happens when the last reader leaves.
    """

    request_id: str
    digest: bytes
    prompt_token_ids: bytes
    params: SamplingParams
    seed: int
    priority: int = 0
    deadline_s: float | None = None
    on_disconnect: OnDisconnect = "detach"

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt, tokens."""
        return len(self.prompt_token_ids) // 4


def body_digest(prompt_token_ids: bytes, params: SamplingParams, priority: int) -> bytes:
    """What makes two submits of one id the same.

    A drawn seed, the deadline and `on_disconnect` belong to the call: a client that tries again has less time left.
    Hashed from the checked fields, because the encoding of a protobuf message is not unique.
    """
    fields = msgspec.structs.asdict(params) | {"logit_bias": sorted(params.logit_bias.items())}
    body = msgspec.msgpack.encode([prompt_token_ids, list(fields.values()), priority])
    return hashlib.blake2b(body, digest_size=16).digest()


def pack_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as u32 little-endian; inverse of `unpack_ids`."""
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def unpack_ids(packed: bytes) -> list[int]:
    """Token ids of `pack_ids`."""
    return list(struct.unpack(f"<{len(packed) // 4}I", packed))


class Finish(NamedTuple):
    """How a choice ended; part of the job, so every reader sees the same.

    Attributes:
        stop_match: the stop string that ended it.
        error: sentence for reason "error".
        num_cached_tokens: prompt tokens that came from a prefix cache when the choice was first placed.
    """

    reason: FinishReason
    stop_match: str | None
    error: str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


Taken = Literal["new", "repeated", "ahead"]


@dataclass(slots=True, eq=False)
class Choice:
    """One output of a job.

    Attributes:
        output: token ids, text and logprobs; decides stop strings when a token is appended.
        held: rows that came ahead of their turn.
        num_cached_tokens: -1 until an engine has said.
        first_token_s, last_token_s: monotonic.
    """

    num_prompt_tokens: int
    output: ChoiceOutput
    finish: Finish | None = None
    held: list[TokenRow] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = -1
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Position of the next token."""
        return len(self.output.token_ids)

    def take(self, row: TokenRow, now: float) -> Taken:
        """Append what is new of a row, then of the held rows that follow it.

        Nothing is appended twice, out of order, or after the finish: of a row that repeats known positions only the
        rest counts, a row from further ahead is held until the positions before it are there. A row that no output
        can hold ends this choice with an error, and nothing else.
        """
        if row.num_cached_tokens >= 0 and self.num_cached_tokens < 0:
            self.num_cached_tokens = row.num_cached_tokens
        if row.prompt_logprobs is not None and self.prompt_logprobs is None:
            self.prompt_logprobs = row.prompt_logprobs
        if row.first_position > self.num_tokens:
            self.held.append(row)
            return "ahead"
        taken: Taken = "new" if self._append(row, now) else "repeated"
        while (turn := next((row for row in self.held if row.first_position <= self.num_tokens), None)) is not None:
            self.held.remove(turn)
            self._append(turn, now)
        return taken

    def _append(self, row: TokenRow, now: float) -> bool:
        num_known = self.num_tokens - row.first_position
        token_ids = row.token_ids[num_known:]
        finish = row.finish if num_known <= len(row.token_ids) else None
        if not token_ids and finish is None:
            return False
        if token_ids:
            self.first_token_s = self.first_token_s if self.num_tokens else now
            self.last_token_s = now
        try:
            if token_ids and not 0 <= min(token_ids) <= max(token_ids) < 2**32:
                raise OutputError(f"token ids {min(token_ids)} to {max(token_ids)} are not unsigned 32-bit")
            logprobs = None if row.logprobs is None else row.logprobs[num_known:]
            self.output.append(token_ids, logprobs, finish)
        except OutputError as error:
            self.end("error", f"the engine sent a row that cannot be: {error}")
        else:
            self._close(row.error)
        return True

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        """Finish from outside: the tokens so far stay, withheld text is let go."""
        self.output.append((), None, reason)
        self._close(error)

    def _close(self, error: str | None) -> None:
        if self.output.finish is None:
            return
        self.held.clear()
        self.finish = Finish(
            self.output.finish,
            self.output.stop_match,
            error if self.output.finish == "error" else None,
            self.num_prompt_tokens,
            max(self.num_cached_tokens, 0),
            self.num_tokens,
        )


@dataclass(slots=True, eq=False)
class Job:
    """One request and all that became of it.

    Attributes:
        order: arrival number; keeps its place in the queue through every re-placement.
        deadline: monotonic instant, or None.
        epoch: number of its placement, unique in the life of the controller (an id used again cannot collect rows of
            its earlier job); 0 = not placed.
        replica: where it is placed, or None.
        fingerprint: plan of the replica that gave the first token; only an equal one may continue.
        readers: how many follow it now.
        cancel_at: instant at which it is cancelled because nobody follows it, or None.
        gap_since: instant since which rows wait for an earlier one, or None.
        finished_at: instant of the finish of its last choice, or None.
    """

    request: JobRequest
    choices: list[Choice]
    order: int
    submitted_at: float
    deadline: float | None
    epoch: int = 0
    replica: int | None = None
    fingerprint: str | None = None
    readers: int = 0
    cancel_at: float | None = None
    gap_since: float | None = None
    finished_at: float | None = None

    @property
    def state(self) -> JobState:
        """Where the job is in its life."""
        if self.finished_at is not None:
            return "finished"
        return "queued" if self.replica is None else "running"

    @property
    def queue_key(self) -> tuple[int, int]:
        """Smaller is placed first."""
        return self.request.priority, self.order

    @property
    def num_open(self) -> int:
        """Choices without a finish."""
        return sum(choice.finish is None for choice in self.choices)

    def unplace(self) -> None:
        """Leave the replica: its epoch ends, and what was held under it goes."""
        self.replica = None
        self.epoch = 0
        self.gap_since = None
        for choice in self.choices:
            choice.held.clear()

    def place(self) -> Place:
        """The frame that starts or continues the job under its present epoch."""
        request = self.request
        outputs = [pack_ids(choice.output.token_ids) if choice.finish is None else None for choice in self.choices]
        return Place(
            request.request_id,
            self.epoch,
            request.prompt_token_ids,
            outputs,
            request.params,
            request.seed,
            request.priority,
        )

    def check(self) -> None:
        """All invariants of one job, O(choices)."""
        assert (self.finished_at is not None) == (self.num_open == 0)
        assert (self.replica is not None) == (self.epoch > 0)
        assert self.state != "finished" or self.replica is None
        assert len(self.choices) == self.request.params.n
        assert self.readers >= 0
        for choice in self.choices:
            assert all(row.first_position > choice.num_tokens for row in choice.held)
            assert choice.finish is None or (not choice.held and choice.finish.num_output_tokens == choice.num_tokens)
        assert (self.gap_since is not None) == any(choice.held for choice in self.choices)
