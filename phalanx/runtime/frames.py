"""Frames between the controller and an engine, and their codec.

    controller -> engine   Welcome  Place  Abort  Shutdown  AskScale  Scale  AbortScale
    engine -> controller   Hello  TokenEvents  Heartbeat  Failed  ScaleEstimate  ScaleState

A frame is a msgpack array `[kind, field, ...]`; `kind` selects the class in one table (the `Frame` union), every
field is type-checked while decoding, no pickle anywhere. The same classes are called directly when engine and front
end share a process (`LLM`).
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from phalanx.errors import PhalanxError
from phalanx.runtime.sampling_params import SamplingParams
from phalanx.runtime.scaling import Phase

VERSION = 1
MAX_FRAME_BYTES = 256 * 2**20

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
RequestId = Annotated[str, Meta(min_length=1, max_length=128)]
Seed = Annotated[int, Meta(ge=0)]


class WireError(PhalanxError):
    """A peer sent bytes that are no frame of this version."""


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The controller accepts an engine under this incarnation."""

    version: int
    incarnation: int


class Place(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Run a request: prompt and output stay separate, so penalties, min_tokens and positions survive a resume.

    Attributes:
        job: request id.
        epoch: placement number of the job; rows of another epoch are dropped by the controller.
        prompt_token_ids: u32 little-endian, packed.
        outputs: per choice, the ids already emitted (packed like the prompt); a finished choice is None.
        seed: always set.
        priority: smaller runs first.
    """

    job: RequestId
    epoch: int
    prompt_token_ids: bytes
    outputs: list[bytes | None]
    params: SamplingParams
    seed: Seed
    priority: int = 0


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Stop a choice (or all, choice = -1) of a job; no further rows of it are wanted."""

    job: RequestId
    epoch: int
    choice: int = -1


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """End the engine: fenced, or the deployment goes down."""

    reason: str


class AskScale(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """What would another number of dp ranks take? Answered by `ScaleEstimate` with the same `call`; changes nothing."""

    call: int
    data: int
    leave: tuple[str, ...] = ()


class Scale(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Begin to change the number of dp ranks; `ScaleState` frames tell how it goes.

    Attributes:
        leave: names of nodes on which no rank shall stay.
    """

    op_id: str
    data: int
    leave: tuple[str, ...] = ()


class AbortScale(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Take an operation back; ignored once it is committed or over."""

    op_id: str
    reason: str


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """First frame of an engine.

    Attributes:
        fingerprint: digest of the resolved plan; two replicas with different ones never exchange jobs.
        max_model_len: longest prompt + output, tokens.
        max_request_tokens: the same bounded by the KV pool.
        num_blocks, block_size: KV pool per dp rank.
        dp_size: independent KV domains.
        startup_s: phase name -> seconds.
        ranks: one line per rank: what ran where.
    """

    version: int
    replica: int
    incarnation: int
    fingerprint: str
    max_model_len: int
    max_request_tokens: int
    num_blocks: int
    block_size: int
    dp_size: int
    startup_s: dict[str, float]
    ranks: list[str]


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token and of the likeliest ids at its position, descending."""

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class TokenRow(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one choice.

    Attributes:
        first_position: index of `token_ids[0]` in the choice's output.
        finish: set on the last row of the choice; the finishing token (stop id) is in `token_ids`.
        error: sentence for finish = "error".
        prompt_logprobs: once per choice with the first row, entry i for prompt token i + 1.
        num_cached_tokens: prompt tokens served by the prefix cache, with the first row of a placement, else -1.
    """

    job: str
    epoch: int
    choice: int
    first_position: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish: FinishReason | None = None
    error: str | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = -1


class TokenEvents(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """All new tokens of one engine step."""

    step: int
    rows: list[TokenRow]


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """Sent every 250 ms from a thread other than the step loop; counters are cumulative since the incarnation began.

    Attributes:
        expert_load: tokens that met the experts of each rank lately; empty for a dense model.
        num_dropped: choices of an expert that a capacity limit dropped.
        num_moved: experts that changed their slot while serving.
        num_single_experts: experts, over all MoE layers, with one live copy, where a lost rank should only shrink the
            group; else 0.
    """

    seq: int
    step: int
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_total_blocks: int
    prefix_queries: int
    prefix_hits: int
    num_preemptions: int
    num_generated_tokens: int
    num_prompt_tokens: int
    expert_load: list[int] = []
    num_dropped: int = 0
    num_moved: int = 0
    num_single_experts: int = 0


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=14):
    """Last words of an engine: the first failing rank's error; others are consequences."""

    rank: int
    node: str
    log_path: str
    error: str


class StageBytes(msgspec.Struct, frozen=True, array_like=True):
    """Bytes that each rank of a pipeline stage holds after scaling; a new rank reads the first two from disk."""

    dense: int
    experts: int
    workspace: int
    kv: int


class ScaleEstimate(msgspec.Struct, frozen=True, array_like=True, tag=15):
    """What an operation would do; estimated, as the plan of a deployment is.

    Attributes:
        call: of the `AskScale`.
        refusal: why it cannot be, with the numbers; "" = it can.
        generation: of the expert groups now; what was estimated for another one is outdated.
        old, new: dp ranks before and after.
        pp, tp: ranks of one dp rank.
        slots_per_rank: physical expert slots.
        num_experts: of the MoE layer that has most.
        stages: what a rank of each pipeline stage holds.
        moved_rows, moved_bytes: experts that travel between ranks before others may leave, over all MoE layers.
        nodes: names of those with ranks of the replica.
    """

    call: int
    refusal: str
    generation: int
    old: int
    new: int
    pp: int
    tp: int
    slots_per_rank: int
    num_experts: int
    stages: list[StageBytes]
    moved_rows: int
    moved_bytes: int
    nodes: list[str] = []


class ScaleState(msgspec.Struct, frozen=True, array_like=True, tag=16):
    """How an operation goes: sent when it begins and whenever its phase changes.

    Attributes:
        op_id: the controller's, or one of the engine's own after it lost a rank.
        detail: why it was aborted.
        data: dp ranks that serve now.
        wanted: ranks to be started, one list per dp rank; they dial the engine.
        gone: ranks that are not needed any more.
        ranks: as in `Hello`, when the operation has changed who serves.
    """

    op_id: str
    phase: Phase
    detail: str
    data: int
    wanted: list[list[int]]
    gone: list[int]
    ranks: list[str]


Frame = (
    Welcome
    | Place
    | Abort
    | Shutdown
    | AskScale
    | Scale
    | AbortScale
    | Hello
    | TokenEvents
    | Heartbeat
    | Failed
    | ScaleEstimate
    | ScaleState
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def encode(frame: Frame) -> bytes:
    """A frame as bytes; inverse of `decode`."""
    return _encoder.encode(frame)


def decode(data: bytes) -> Frame:
    """Parse a frame of a peer.

    Raises:
        WireError: not a frame, an unknown kind, a field of another type, or over `MAX_FRAME_BYTES`.
    """
    if len(data) > MAX_FRAME_BYTES:
        raise WireError(f"frame of {len(data)} bytes; at most {MAX_FRAME_BYTES} are accepted")
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, PhalanxError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"not a frame of version {VERSION}: {error}") from error
