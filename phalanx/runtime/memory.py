"""What a rank needs in memory, and the KV pool that fits beside it. Estimates made before anything is loaded; pure."""

from collections.abc import Sequence
from typing import NamedTuple

from phalanx.errors import ConfigError
from phalanx.models.sizes import expert_parameter_count, kv_bytes_per_token, parameter_count, widest_row
from phalanx.models.spec import DecoderConfig
from phalanx.parallel.mesh import MeshShape
from phalanx.runtime.expert_config import STAGING_ROWS
from phalanx.runtime.kv.spec import KVSpec
from phalanx.runtime.step_builder import MAX_PROMPT_LOGPROBS

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
CPU_KV_FRACTION = 0.2
CPU_TOKENS_PER_SEQUENCE = 1024

LOGITS_BYTES = 8
"""Per logit: fp32, once as computed and once while sampling."""


class Batch(NamedTuple):
    """Limits of a step of one data-parallel rank."""

    max_tokens: int
    max_sequences: int


class StageBytes(NamedTuple):
    """Bytes of one rank of a pipeline stage; `block` is one KV block of all its layers."""

    stage: int
    weights: int
    workspace: int
    block: int


class Share(NamedTuple):
    """Bytes a rank may use.

    Attributes:
        limit: for everything.
        auto_kv: for the pool, when nobody says how many blocks it has.
        fill: such a pool takes all of that, not only what its sequences usually need.
    """

    limit: int
    auto_kv: int
    fill: bool


def stage_bytes(
    model: DecoderConfig,
    shape: MeshShape,
    stage: int,
    layers: tuple[int, int],
    itemsize: int,
    block_size: int,
    batch: Batch,
    slots_per_rank: int | None = None,
) -> StageBytes:
    """What every rank of a stage needs; `slots_per_rank` as in `parameter_count`.

    Workspace is the widest moment of a step: three rows of hidden size per token and one layer's projections; on the
    last stage also one row of logits per sequence and per prompt token that wants one; and where there are experts, the
    rows that hold those on their way here.
    """
    is_first, is_last = stage == 0, stage == shape.pp - 1
    weights = parameter_count(model, shape, layers, is_first, is_last, slots_per_rank) * itemsize
    widest = max(widest_row(model, layer, shape) for layer in set(model.layers[slice(*layers)]))
    workspace = batch.max_tokens * (3 * model.hidden_size + widest) * itemsize
    if is_last:
        workspace += (batch.max_sequences + MAX_PROMPT_LOGPROBS) * model.vocab_size * LOGITS_BYTES
    rows = [expert_parameter_count(spec.experts, model.hidden_size) for spec in model.moe_specs(layers)]
    workspace += STAGING_ROWS * max(rows, default=0) * itemsize
    return StageBytes(stage, weights, workspace, block_size * kv_bytes_per_token(model, shape.tp, layers, itemsize))


def gpu_share(memory_bytes: int, fraction: float) -> Share:
    """All of a GPU's memory up to `fraction`; the rest is for CUDA's context, graphs and fragmentation."""
    limit = int(memory_bytes * fraction)
    return Share(limit, limit, fill=True)


def cpu_share(memory_bytes: int, ranks_on_node: int) -> Share:
    """An even part of the node's memory, a fifth of it for KV."""
    limit = memory_bytes // ranks_on_node
    return Share(limit, int(limit * CPU_KV_FRACTION), fill=False)


def size_pool(
    ranks: Sequence[tuple[StageBytes, Share]],
    *,
    block_size: int,
    num_blocks: int | None,
    max_model_len: int | None,
    max_position: int,
    max_sequences: int,
) -> KVSpec:
    """The pool of every rank, which the fullest one decides.

    Args:
        ranks: what each needs and may use.
        block_size: tokens per block.
        num_blocks: as the user says, or None: on a GPU all that fits; on a CPU room for `max_sequences` of
            `CPU_TOKENS_PER_SEQUENCE` tokens (or of the longest length, if shorter) or for one longest sequence,
            whichever is more, as far as that fits.
        max_model_len: as the user says, or None: `max_position`, or what the pool holds if that is less.
        max_position: of the model.
        max_sequences: that run at once.

    Raises:
        ConfigError: weights, the wanted blocks, or one longest sequence do not fit.
    """
    fits, (needs, share) = min(
        ((_fitting_blocks(needs, share, num_blocks is None), (needs, share)) for needs, share in ranks),
        key=lambda pair: pair[0],
    )
    if fits < 2:
        raise ConfigError(
            f"a rank of pipeline stage {needs.stage} does not fit: {readable(needs.weights)} of weights, "
            f"{readable(needs.workspace)} of workspace and two KV blocks of {readable(needs.block)}, but it may use "
            f"{readable(share.limit)}; raise parallel.tensor or parallel.pipeline, or lower scheduler.max_batch_tokens"
        )
    if num_blocks is not None and num_blocks > fits:
        raise ConfigError(
            f"kv.num_blocks ({num_blocks}) takes {readable(num_blocks * needs.block)} on each rank, which has room for "
            f"{fits} blocks beside weights and workspace; use {fits} or less, or auto"
        )
    ceiling = fits if num_blocks is None else num_blocks
    longest = min(max_position, (ceiling - 1) * block_size) if max_model_len is None else max_model_len
    # Refuses a pool in which the longest sequence could never run, by the same formula as admission.
    spec = KVSpec(block_size=block_size, num_blocks=ceiling, max_model_len=longest)
    if num_blocks is not None or share.fill:
        return spec
    usual = max_sequences * spec.max_blocks(min(longest, CPU_TOKENS_PER_SEQUENCE))
    wanted = max(usual, spec.max_blocks(longest)) + 1
    return KVSpec(block_size=block_size, num_blocks=min(ceiling, wanted), max_model_len=longest)


def _fitting_blocks(needs: StageBytes, share: Share, auto: bool) -> int:
    """KV blocks beside weights and workspace; negative if not even those fit."""
    room = share.limit - needs.weights - needs.workspace
    return (min(room, share.auto_kv) if auto else room) // needs.block


def readable(num_bytes: int) -> str:
    """Three digits and a binary unit, for people."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.3g} {unit}" if abs(value) < 1000 else f"{value:.0f} {unit}"
