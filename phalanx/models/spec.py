"""What a decoder is: the family files produce it, the decoder builds from it, the planner counts its bytes.

The decoder never tests a model name; every difference between families is a value below.
"""

from dataclasses import dataclass, replace
from typing import Literal

from phalanx.moe.spec import CapacitySpec, MoeSpec

Activation = Literal["silu", "gelu_tanh"]
QKNorm = Literal["none", "head", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding of one layer kind.

    Attributes:
        theta: base of the inverse frequencies.
        rotary_dim: leading channels of a head that rotate; even, at most `head_dim`.
        interleaved: pairs are (2i, 2i+1) instead of (i, i + rotary_dim/2).
        scaling: how frequencies change for long contexts; its parameters are below, 0 where unused.
    """

    theta: float
    rotary_dim: int
    interleaved: bool = False
    scaling: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Grouped-query attention of one layer.

    Attributes:
        num_heads, num_kv_heads, head_dim: global counts, before tensor parallelism.
        window: a key is visible iff `query position - key position < window`; None = all.
        softcap: `softcap * tanh(score / softcap)` before the mask; None = off.
        scale: factor of the scores.
        qk_norm: none, over each head, or over the full projected width (before the head split).
        sinks: per-head logits that take part in the softmax and hold no value.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec
    window: int | None = None
    softcap: float | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: QKNorm = "none"
    sinks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaSpec:
    """Multi-head latent attention of one layer (DeepSeek-V2, arXiv:2405.04434 sec. 2.1).

    The pool holds one latent row of `kv_lora_rank + rope_dim` channels per token, shared by all heads and used as key
    and as value, so its tile has no separate value half.

    Attributes:
        num_heads: global, before tensor parallelism.
        q_lora_rank: width of the query's own latent; None = a plain query projection.
        kv_lora_rank: width of the latent of keys and values.
        nope_dim, rope_dim, value_dim: channels of a head without and with rotation, and of its value.
        scale: factor of the scores.
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    rope: RopeSpec
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpSpec:
    """Gated feed-forward: `down(act(gate(x)) * up(x))`."""

    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """Where a layer normalises. Weights are RMS norms; `unit_offset` means the stored weight is `w - 1`.

    attn_in, mlp_in are before the block (pre-norm), attn_out, mlp_out after it and before the residual add.
    """

    attn_in: bool = True
    attn_out: bool = False
    mlp_in: bool = True
    mlp_out: bool = False
    eps: float = 1e-6
    unit_offset: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer."""

    attention: AttentionSpec | MlaSpec
    mlp: MlpSpec | MoeSpec
    norms: NormSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A whole decoder-only model; a pipeline stage takes `layers[a:b]`.

    Attributes:
        model_type: Hugging Face `model_type`, for messages only.
        max_position: longest position the checkpoint was made for, tokens.
        embed_scale: factor of the embedding, rounded to the weight dtype before the product; None = 1.
        logit_softcap: `cap * tanh(logits / cap)`; None = off.
        tied_head: the head is the embedding matrix.
        dtype: the checkpoint's own dtype name: "float32", "bfloat16", "float16".
        eos_token_ids: ids that end a sequence unless the request says `ignore_eos`.
        num_extra_layers: layers the checkpoint may hold past the last one (multi-token prediction); they are not read.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    max_position: int
    norm_eps: float
    norm_unit_offset: bool = False
    tied_head: bool = False
    embed_scale: float | None = None
    logit_softcap: float | None = None
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()
    num_extra_layers: int = 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose feed-forward is a mixture of experts."""
        return tuple(index for index, layer in enumerate(self.layers) if isinstance(layer.mlp, MoeSpec))

    def moe_specs(self, layer_range: tuple[int, int]) -> tuple[MoeSpec, ...]:
        """The mixture-of-experts blocks of a stage's layers [start, stop), in order."""
        return tuple(layer.mlp for layer in self.layers[slice(*layer_range)] if isinstance(layer.mlp, MoeSpec))

    @property
    def num_tasks(self) -> int:
        """Tasks a request may name; 0 = the model chooses experts token by token."""
        tasks = [spec.tasks for spec in self.moe_specs((0, len(self.layers))) if spec.tasks is not None]
        return len(tasks[0].experts) if tasks else 0

    def limited(self, capacity: CapacitySpec | None) -> "DecoderConfig":
        """The same decoder whose experts take no more tokens than `capacity` allows; None = dropless, as it is."""
        layers = [
            replace(layer, mlp=replace(layer.mlp, capacity=capacity)) if isinstance(layer.mlp, MoeSpec) else layer
            for layer in self.layers
        ]
        return replace(self, layers=tuple(layers))
