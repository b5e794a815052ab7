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
    """Sampling of a slot; fields as in `SamplingParams`, `logprobs`, `prompt_logprobs` and `task` -1 = off."""

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
    task: int = -1


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


class Move(msgspec.Struct, frozen=True, array_like=True):
    """Copy the weights of an expert from a slot into a staging row of another rank, beside the step.

    Attributes:
        layer: counted over the MoE layers of the whole model.
        source, target: physical slots of the expert group; the row is staged on the rank of `target`.
        staging: row of that rank's staging ring.
    """

    id: int
    layer: int
    source: int
    target: int
    staging: int


class Flip(msgspec.Struct, frozen=True, array_like=True):
    """Switch a MoE layer to another placement before the step runs: staged rows become slots, tables are overwritten.

    Attributes:
        copies: flat pairs (staging row, physical slot), of all ranks; each rank takes its own.
        physical_to_logical: the whole new placement.
    """

    layer: int
    version: int
    physical_to_logical: list[int]
    copies: list[int]


class ExpertStep(msgspec.Struct, frozen=True, array_like=True):
    """What the expert groups do in a step.

    Attributes:
        kind: of the dispatcher.
        padded_tokens: at least the tokens of every dp rank.
        report_load: every rank sends the loads it counted, and starts at 0 again.
        moves: begin with this step; each is acknowledged by `MovesDone`.
        flips: before the forward of this step.
    """

    kind: str
    padded_tokens: int
    report_load: bool = False
    moves: list[Move] = []
    flips: list[Flip] = []


class StepPlan(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One step of a replica, for all its ranks.

    Attributes:
        step: consecutive from 0, across generations.
        generation: changes when the mesh does.
        schedule_hash: running digest of all rows planned so far; a rank that computes another one fails at once.
        domains: one per dp rank.
        experts: None for a dense model.
    """

    step: int
    generation: int
    schedule_hash: int
    domains: list[DomainPlan]
    experts: ExpertStep | None = None


class Prepare(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Build the expert groups of another generation beside the ones in use; answered by `Prepared`.

    Attributes:
        dp_rank: of the receiver in that generation.
        nodes: name of the node of each rank of the receiver's stage, in the order of the new expert group.
    """

    generation: int
    dp_rank: int
    nodes: list[str]


class Enter(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Switch to a prepared generation; no step is in flight.

    Attributes:
        step, schedule_hash: what the next plan continues from.
        placements: physical_to_logical of each MoE layer of the receiver's stage; its own slots hold these experts
            already.
        reset: forget all slots, because a step of the old generation failed half-way.
    """

    generation: int
    step: int
    schedule_hash: int
    placements: list[list[int]]
    reset: bool = False


class Discard(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Give up a prepared generation, or one that is not built yet."""

    generation: int


Order = StepPlan | Prepare | Enter | Discard
"""What an engine sends to a rank after its `RankSpec`."""


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
        fabric: measured constants of the expert group's network; empty = not measured.
        expert_rows: back end and bytes per row of its experts: rows travel between ranks, so all must have the same.
    """

    rank: int
    digest: str
    node: str
    pid: int
    device: str
    log_path: str
    startup_s: dict[str, float]
    fabric: list[float] = []
    expert_rows: str = ""


class ExpertLoad(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Tokens per logical expert that a rank routed since its last report.

    Attributes:
        first_layer: of the stage, counted over the MoE layers of the model.
        counts: little-endian i64, layer by layer, `num_experts` of each.
        num_dropped: tokens a capacity limit dropped.
    """

    rank: int
    first_layer: int
    counts: list[bytes]
    num_dropped: int = 0


class MovesDone(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Moves whose rows are staged on this rank; `failed` ones arrived damaged."""

    rank: int
    ids: list[int]
    failed: list[int]


class Prepared(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The groups of a generation are built, or why not."""

    rank: int
    generation: int
    error: str = ""


class StepFailed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A step ended in a broken exchange: a peer is gone. The rank drops plans until it enters another generation."""

    rank: int
    generation: int
    error: str


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank is alive; sent by a thread of its own, so only a dead or frozen process falls silent."""

    rank: int


class RankFailed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank's last words."""

    rank: int
    node: str
    log_path: str
    error: str


RankMessage = StepResult | Ready | Ping | RankFailed | ExpertLoad | MovesDone | Prepared | StepFailed

_encoder = msgspec.msgpack.Encoder()
_order_decoder: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_message_decoder: msgspec.msgpack.Decoder[RankMessage] = msgspec.msgpack.Decoder(RankMessage)


def encode(message: Order | RankMessage) -> bytes:
    """A message of the rank link as bytes."""
    return _encoder.encode(message)


def decode_order(data: bytes) -> Order:
    """Parse an engine's message on a rank; raises `PlanError`."""
    try:
        return _order_decoder.decode(data)
    except BAD_BYTES as error:
        raise PlanError(f"not an order: {error}") from error


def decode_message(data: bytes) -> RankMessage:
    """Parse a rank's message on the engine; raises `PlanError`."""
    try:
        return _message_decoder.decode(data)
    except BAD_BYTES as error:
        raise PlanError(f"not a rank message: {error}") from error


def roll_hash(previous: int, rows: list[int]) -> int:
    """Running digest of planned rows; the hash of a tuple of ints is not salted, so it is equal on every machine."""
    return hash((previous, *rows)) & 0x7FFFFFFFFFFFFFFF
