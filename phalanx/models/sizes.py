"""What one rank holds, computed without building anything: for the planner. No torch here."""

from phalanx.errors import ConfigError
from phalanx.models.spec import AttentionSpec, DecoderConfig, LayerSpec
from phalanx.parallel.mesh import MeshShape
from phalanx.parallel.partition import padded, shard, shard_or_replicate


def parameter_count(
    config: DecoderConfig, shape: MeshShape, layer_range: tuple[int, int], is_first: bool, is_last: bool
) -> int:
    """Weight elements of one rank of a stage; all ranks of the stage hold equally many.

    Norm weights are kept in fp32 whatever the dtype; they count as elements like the rest (far below 0.1 %).

    Args:
        config: of the whole model.
        shape: of the mesh.
        layer_range: the stage's layers [start, stop).
        is_first: the stage holds the embedding.
        is_last: the stage holds the last norm and the head (once, if it holds the tied embedding already).

    Raises:
        ConfigError: the tensor axis does not divide the model.
    """
    vocabulary = padded(config.vocab_size, shape.tp) // shape.tp * config.hidden_size
    count = sum(_layer(layer, config.hidden_size, shape.tp) for layer in config.layers[slice(*layer_range)])
    if is_first:
        count += vocabulary
    if is_last:
        count += config.hidden_size + (0 if is_first and config.tied_head else vocabulary)
    return count


def kv_bytes_per_token(config: DecoderConfig, tp: int, layer_range: tuple[int, int], itemsize: int) -> int:
    """Bytes of keys and values that one token takes on one rank of a stage; `itemsize` in bytes.

    Raises:
        ConfigError: as `kv_heads_and_dim`.
    """
    kv_heads, head_dim = kv_heads_and_dim(config, tp, layer_range)
    return (layer_range[1] - layer_range[0]) * 2 * kv_heads * head_dim * itemsize


def kv_heads_and_dim(config: DecoderConfig, tp: int, layer_range: tuple[int, int]) -> tuple[int, int]:
    """Local kv heads and head width of a stage's pool.

    Raises:
        ConfigError: the tensor axis does not fit the kv heads, or layers of the stage differ (one pool holds them all).
    """
    kinds = {(_kv_heads(layer.attention, tp), layer.attention.head_dim) for layer in config.layers[slice(*layer_range)]}
    if len(kinds) != 1:
        raise ConfigError(
            f"{config.model_type}: layers {layer_range} have different kv heads or head sizes {sorted(kinds)}; "
            "one KV pool needs them equal"
        )
    return kinds.pop()


def _kv_heads(attention: AttentionSpec, tp: int) -> int:
    return shard_or_replicate("num_kv_heads", attention.num_kv_heads, 0, tp).size


def _layer(layer: LayerSpec, hidden_size: int, tp: int) -> int:
    attention, mlp, norms = layer.attention, layer.mlp, layer.norms
    q = shard("num_heads", attention.num_heads, 0, tp).size * attention.head_dim
    kv = _kv_heads(attention, tp) * attention.head_dim
    inner = shard("intermediate_size", mlp.intermediate_size, 0, tp).size
    count = hidden_size * (q + 2 * kv) + q * hidden_size + 3 * hidden_size * inner
    count += hidden_size * sum([norms.attn_in, norms.attn_out, norms.mlp_in, norms.mlp_out])
    count += (q + 2 * kv) * attention.qkv_bias + hidden_size * attention.o_bias
    count += (2 * inner + hidden_size) * mlp.bias
    count += {"none": 0, "head": 2 * attention.head_dim, "full": q + kv}[attention.qk_norm]
    return count + attention.sinks * (q // attention.head_dim)
