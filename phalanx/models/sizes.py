"""What one rank holds, computed without building anything: for the planner. No torch here."""

from typing import NamedTuple

from phalanx.errors import ConfigError
from phalanx.models.spec import AttentionSpec, DecoderConfig, LayerSpec, MlaSpec, MlpSpec
from phalanx.moe.placement.types import slots_of
from phalanx.moe.spec import ExpertSpec, MoeSpec
from phalanx.parallel.mesh import MeshShape
from phalanx.parallel.partition import padded, shard, shard_or_replicate

IMBALANCE = 2
"""Rows that the busiest rank of an expert group gets, over the mean: what a workspace is planned for."""


class KvTile(NamedTuple):
    """What a token takes in one layer of the pool: `parts` (key and value: 2; one latent row: 1) x heads x dim."""

    parts: int
    heads: int
    dim: int


def parameter_count(
    config: DecoderConfig,
    shape: MeshShape,
    layer_range: tuple[int, int],
    is_first: bool,
    is_last: bool,
    slots_per_rank: int | None = None,
) -> int:
    """Weight elements of one rank of a stage; all ranks of the stage hold equally many.

    Norm weights are kept in fp32 whatever the dtype; they count as elements like the rest (far below 0.1 %).

    Args:
        config: of the whole model.
        shape: of the mesh.
        layer_range: the stage's layers [start, stop).
        is_first: the stage holds the embedding.
        is_last: the stage holds the last norm and the head (once, if it holds the tied embedding already).
        slots_per_rank: experts that every rank holds of each layer with as many; None = as few as the dp x tp ranks
            can, so that they hold the largest layer of the stage.

    Raises:
        ConfigError: the tensor axis does not divide the model.
    """
    vocabulary = padded(config.vocab_size, shape.tp) // shape.tp * config.hidden_size
    most = max((spec.router.num_experts for spec in config.moe_specs(layer_range)), default=0)
    slots = slots_per_rank or -(-most // (shape.dp * shape.tp))
    count = sum(_layer(layer, config.hidden_size, shape, slots) for layer in config.layers[slice(*layer_range)])
    if is_first:
        count += vocabulary
    if is_last:
        count += config.hidden_size + (0 if is_first and config.tied_head else vocabulary)
    return count


def expert_parameter_count(spec: ExpertSpec, hidden_size: int) -> int:
    """Weight elements of one routed expert, which lies in one slot of one rank: what moves when it does."""
    bias = (2 * spec.intermediate_size + hidden_size) * spec.bias
    return 3 * hidden_size * spec.intermediate_size + bias


def kv_bytes_per_token(config: DecoderConfig, tp: int, layer_range: tuple[int, int], itemsize: int) -> int:
    """Bytes of keys and values that one token takes on one rank of a stage; `itemsize` in bytes.

    Raises:
        ConfigError: as `kv_tile`.
    """
    tile = kv_tile(config, tp, layer_range)
    return (layer_range[1] - layer_range[0]) * tile.parts * tile.heads * tile.dim * itemsize


def kv_tile(config: DecoderConfig, tp: int, layer_range: tuple[int, int]) -> KvTile:
    """What a token takes in each layer of a stage's pool, on one rank.

    Raises:
        ConfigError: the tensor axis does not fit the kv heads, or layers of the stage differ (one pool holds them all).
    """
    tiles = {_tile(layer.attention, tp) for layer in config.layers[slice(*layer_range)]}
    if len(tiles) != 1:
        kinds = sorted((tile.heads, tile.dim) for tile in tiles)
        raise ConfigError(
            f"{config.model_type}: layers {layer_range} have different kv heads or head sizes {kinds}; "
            "one KV pool needs them equal"
        )
    return tiles.pop()


def widest_row(config: DecoderConfig, layer: LayerSpec, shape: MeshShape) -> int:
    """Elements per token of the widest moment of one layer, on one rank: its projections, with their results."""
    attention, mlp, tp = layer.attention, layer.mlp, shape.tp
    if isinstance(attention, MlaSpec):
        latent = attention.kv_lora_rank + attention.rope_dim
        per_head = attention.nope_dim + attention.rope_dim + attention.value_dim + 2 * latent
        width = attention.num_heads * per_head // tp + 2 * latent + (attention.q_lora_rank or 0)
    else:
        heads = 2 * attention.num_heads + 2 * max(attention.num_kv_heads, tp)
        width = heads * attention.head_dim // tp
    if isinstance(mlp, MlpSpec):
        return max(width, 3 * mlp.intermediate_size // tp)
    # A token's choices are computed somewhere in the group: on average each rank has as many pairs as tokens * k / tp.
    pair = 3 * mlp.experts.intermediate_size + 3 * config.hidden_size
    shared = 3 * mlp.shared.intermediate_size // tp if mlp.shared else 0
    routed = pair * mlp.router.top_k * (1 if shape.dp * tp == 1 else IMBALANCE) // tp
    return max(width, routed + shared)


def _tile(attention: AttentionSpec | MlaSpec, tp: int) -> KvTile:
    if isinstance(attention, MlaSpec):
        return KvTile(1, 1, attention.kv_lora_rank + attention.rope_dim)
    return KvTile(2, _kv_heads(attention, tp), attention.head_dim)


def _kv_heads(attention: AttentionSpec, tp: int) -> int:
    return shard_or_replicate("num_kv_heads", attention.num_kv_heads, 0, tp).size


def _layer(layer: LayerSpec, hidden_size: int, shape: MeshShape, slots_per_rank: int) -> int:
    attention, mlp, norms = layer.attention, layer.mlp, layer.norms
    count = hidden_size * sum([norms.attn_in, norms.attn_out, norms.mlp_in, norms.mlp_out])
    if isinstance(attention, MlaSpec):
        count += _latent_attention(attention, hidden_size, shape.tp)
    else:
        count += _attention(attention, hidden_size, shape.tp)
    if isinstance(mlp, MoeSpec):
        return count + _moe(mlp, hidden_size, shape, slots_per_rank)
    return count + _mlp(mlp, hidden_size, shape.tp)


def _attention(spec: AttentionSpec, hidden_size: int, tp: int) -> int:
    q = shard("num_heads", spec.num_heads, 0, tp).size * spec.head_dim
    kv = _kv_heads(spec, tp) * spec.head_dim
    count = hidden_size * (q + 2 * kv) + q * hidden_size
    count += (q + 2 * kv) * spec.qkv_bias + hidden_size * spec.o_bias
    count += {"none": 0, "head": 2 * spec.head_dim, "full": q + kv}[spec.qk_norm]
    return count + spec.sinks * (q // spec.head_dim)


def _latent_attention(spec: MlaSpec, hidden_size: int, tp: int) -> int:
    heads = shard("num_heads", spec.num_heads, 0, tp).size
    query = heads * (spec.nope_dim + spec.rope_dim)
    latent, rank = spec.kv_lora_rank + spec.rope_dim, spec.q_lora_rank
    count = hidden_size * query if rank is None else rank * (hidden_size + query + 1 + spec.bias)
    count += latent * (hidden_size + spec.bias) + spec.kv_lora_rank
    count += heads * (spec.nope_dim + spec.value_dim) * spec.kv_lora_rank
    return count + heads * spec.value_dim * hidden_size + hidden_size * spec.bias


def _mlp(spec: MlpSpec, hidden_size: int, tp: int) -> int:
    inner = shard("intermediate_size", spec.intermediate_size, 0, tp).size
    return 3 * hidden_size * inner + (2 * inner + hidden_size) * spec.bias


def _moe(spec: MoeSpec, hidden_size: int, shape: MeshShape, slots_per_rank: int) -> int:
    router, experts, shared = spec.router, spec.experts, spec.shared
    slots = slots_of(router.num_experts, slots_per_rank)
    count = 0 if spec.tasks else router.num_experts * (hidden_size + router.gate_bias + router.use_bias)
    count += slots * expert_parameter_count(experts, hidden_size)
    if shared is not None:
        count += _mlp(MlpSpec(intermediate_size=shared.intermediate_size), hidden_size, shape.tp)
        count += hidden_size * shared.gated
    return count + 2 * (hidden_size + 1) * spec.residual
