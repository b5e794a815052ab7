"""Where the tensors of a checkpoint go: the vocabulary between the family files and the loader.

Names of parameters, the same for all families:

    embedding.weight   norm.weight   head.weight                                    of the whole model
    attn_in.weight  attn_out.weight  mlp_in.weight  mlp_out.weight                  of a layer
    attention.qkv_proj.{weight,bias} [q, k, v]   attention.o_proj.{weight,bias}
    attention.q_norm.weight   attention.k_norm.weight
    mlp.gate_up_proj.{weight,bias} [gate, up]    mlp.down_proj.{weight,bias}

and of latent attention and of mixtures of experts, <e> being a logical expert that this rank holds:

    attention.{q_proj,q_a_proj,q_b_proj,kv_a_proj,kv_b_proj}.weight   attention.{q_a,kv_a}_proj.bias
    attention.q_a_norm.weight   attention.kv_a_norm.weight            attention.sinks
    mlp.gate.{weight,bias}   mlp.correction_bias   mlp.shared.<as a dense mlp>   mlp.shared_gate.weight
    mlp.coefficients.{weight,bias}
    mlp.experts.<e>.gate_up_proj.{weight,bias} [gate, up]   mlp.experts.<e>.down_proj.{weight,bias}
"""

from collections.abc import Mapping
from typing import NamedTuple

from phalanx.errors import CheckpointError

WHOLE = ("whole",)
EVERY = "*"


class Stacking(NamedTuple):
    """How one tensor on disk holds a parameter of all experts; a bias has no columns.

    neither       (E, rows, columns)   the segments one after the other
    transposed    (E, columns, rows)
    interleaved   row i of segment j, of n segments, is row n i + j
    """

    transposed: bool = False
    interleaved: bool = False


class Target(NamedTuple):
    """The place of one checkpoint tensor.

    Attributes:
        param: name of the parameter, without the layer; `EVERY` stands for the number of each expert in turn.
        segments: the parts of it that the tensor holds, stacked along dim 0 in this order.
        layer: index of the layer, counted over the whole model; None = not in a layer.
        expert: the logical expert it belongs to, which may be on other ranks; None = not of one expert.
        stacking: the tensor holds all experts; None = one tensor, one parameter.
    """

    param: str
    segments: tuple[str, ...] = WHOLE
    layer: int | None = None
    expert: int | None = None
    stacking: Stacking | None = None

    @property
    def name(self) -> str:
        """Full name of the parameter."""
        return self.param if self.layer is None else f"layers.{self.layer}.{self.param}"


GLOBAL: Mapping[str, str] = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
LLAMA: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "self_attn.q_proj": ("attention.qkv_proj", ("q",)),
    "self_attn.k_proj": ("attention.qkv_proj", ("k",)),
    "self_attn.v_proj": ("attention.qkv_proj", ("v",)),
    "self_attn.o_proj": ("attention.o_proj", WHOLE),
    "self_attn.q_norm": ("attention.q_norm", WHOLE),
    "self_attn.k_norm": ("attention.k_norm", WHOLE),
    "mlp.gate_proj": ("mlp.gate_up_proj", ("gate",)),
    "mlp.up_proj": ("mlp.gate_up_proj", ("up",)),
    "mlp.down_proj": ("mlp.down_proj", WHOLE),
    "input_layernorm": ("attn_in", WHOLE),
    "post_attention_layernorm": ("mlp_in", WHOLE),
}
"""Names of a Llama layer. A family changes entries, for example what `post_attention_layernorm` is."""

# Norms of the families that normalise after a block: the classic name means another place there.
OUT_NORMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "post_attention_layernorm": ("attn_out", WHOLE),
    "pre_feedforward_layernorm": ("mlp_in", WHOLE),
    "post_feedforward_layernorm": ("mlp_out", WHOLE),
}


def llama_locate(key: str, layer_names: Mapping[str, tuple[str, tuple[str, ...]]] = LLAMA) -> Target | None:
    """Place a tensor named as in Llama: `model.layers.<i>.<module>.<weight|bias>` and three global names.

    Returns:
        None for what old exports hold but nobody needs (`rotary_emb.inv_freq`).

    Raises:
        CheckpointError: the name is unknown.
    """
    if key in GLOBAL:
        return Target(GLOBAL[key])
    if key.endswith("rotary_emb.inv_freq"):
        return None
    layer, rest = split_layer(key)
    module, _, kind = rest.rpartition(".")
    if layer is None or kind not in ("weight", "bias") or module not in layer_names:
        raise unknown(key)
    param, segments = layer_names[module]
    return Target(f"{param}.{kind}", segments, layer)


def split_layer(key: str) -> tuple[int | None, str]:
    """`model.layers.<i>.<rest>` as (i, rest); (None, key) for a name outside the layers."""
    number, _, rest = key.removeprefix("model.layers.").partition(".")
    if not key.startswith("model.layers.") or not number.isdecimal():
        return None, key
    return int(number), rest


def unknown(key: str) -> CheckpointError:
    """The error for a tensor without a place."""
    return CheckpointError(f"tensor {key!r} has no place in this model; is config.json of another checkpoint?")
