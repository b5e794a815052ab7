"""What a rank must do in one step, as data, and its codec.

Plans carry changes, not the batch: rank state lives in the `SlotTable`, so planning and sending cost grows with what
changed. A plan can be printed, recorded, replayed, compared, simulated. Ranks decide nothing.
"""

import msgspec

from phalanx.errors import PhalanxError
from phalanx.runtime.frames import TokenLogprobs

BAD_BYTES = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What a decoder raises for bytes that are no message."""


class PlanError(PhalanxError):
    """A rank got a plan that does not follow the one before it, or a peer sent bytes that are no plan."""


class SlotSampling(msgspec.Struct, frozen=True, array_like=True):
    """Sampling of a slot; fields as in `SamplingParams`, `logprobs` and `prompt_logprobs` -1 = off."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    seed: int
    choice: int
    min_tokens: int
    stop_token_ids: list[int]
    logprobs: int
    prompt_logprobs: int


class SlotInit(msgspec.Struct, frozen=True, array_like=True):
    """A sequence enters a slot.

    Attributes:
        token_ids: prompt and output so far, u32 little-endian, packed.
        num_prompt_tokens: how many of them are the prompt.
        num_computed_tokens: tokens whose KV the first blocks of the table already hold (prefix hit).
    """

    slot: int
    token_ids: bytes
    num_prompt_tokens: int
    num_computed_tokens: int
    sampling: SlotSampling


class Extend(msgspec.Struct, frozen=True, array_like=True):
    """A block table grows at `first_index`; entries are never rewritten."""

    slot: int
    first_index: int
    block_ids: list[int]


class DomainPlan(msgspec.Struct, frozen=True, array_like=True):
    """The part of one dp rank, applied in field order.

    Attributes:
        release: slots whose sequence left and that no step in flight uses; a slot may be admitted again at once.
        rows: flat triples (slot, num_tokens, sample 0|1), rows of one token first; their token ids come from the slot.
        num_settled: this dp rank has answered all steps below; its stage 0 takes their sampled ids first of all.
    """

    release: list[int]
    admit: list[SlotInit]
    extend: list[Extend]
    rows: list[int]
    num_settled: int = 0


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """One step of a replica, for all its ranks.

    Attributes:
        step: consecutive from 0 within a generation.
        generation: changes when the mesh does.
        schedule_hash: running digest of all rows planned so far; a rank that computes another one fails at once.
    """

    step: int
    generation: int
    schedule_hash: int
    domains: list[DomainPlan]


class StepResult(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What a dp rank's reporting worker (tp rank 0 of the last stage) sends back, rows in plan order.

    Attributes:
        slots, token_ids: one entry per sampled row.
        failed: indices into `slots` whose logits held a NaN; their token is void.
        logprobs: per sampled row, None where off; empty = nobody asked.
        prompt_logprobs: (slot, entries for this chunk's prompt positions).
        seconds: wall time of the step on the rank.
    """

    step: int
    generation: int
    dp_rank: int
    slots: list[int]
    token_ids: list[int]
    failed: list[int]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: list[tuple[int, list[TokenLogprobs]]]
    seconds: float


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank has loaded and warmed up.

    Attributes:
        digest: of the resolved plan; the engine refuses ranks that disagree.
        startup_s: phase -> seconds (import, load, warm-up).
    """

    rank: int
    digest: str
    node: str
    pid: int
    device: str
    log_path: str
    startup_s: dict[str, float]


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank is alive; sent by a thread of its own, so only a dead or frozen process falls silent."""

    rank: int


class RankFailed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank's last words."""

    rank: int
    node: str
    log_path: str
    error: str


RankMessage = StepResult | Ready | Ping | RankFailed

_encoder = msgspec.msgpack.Encoder()
_plan_decoder = msgspec.msgpack.Decoder(StepPlan)
_message_decoder: msgspec.msgpack.Decoder[RankMessage] = msgspec.msgpack.Decoder(RankMessage)


def encode(message: StepPlan | RankMessage) -> bytes:
    """A message of the rank link as bytes."""
    return _encoder.encode(message)


def decode_plan(data: bytes) -> StepPlan:
    """Parse a plan on a rank; raises `PlanError`."""
    try:
        return _plan_decoder.decode(data)
    except BAD_BYTES as error:
        raise PlanError(f"not a StepPlan: {error}") from error


def decode_message(data: bytes) -> RankMessage:
    """Parse a rank's message on the engine; raises `PlanError`."""
    try:
        return _message_decoder.decode(data)
    except BAD_BYTES as error:
        raise PlanError(f"not a rank message: {error}") from error


def roll_hash(previous: int, rows: list[int]) -> int:
    """Running digest of planned rows; the hash of a tuple of ints is not salted, so it is equal on every machine."""
    return hash((previous, *rows)) & 0x7FFFFFFFFFFFFFFF
