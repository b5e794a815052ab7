"""What a decoder is: the family files produce it, the decoder builds from it, the planner counts its bytes.

The decoder never tests a model name; every difference between families is a value below.
"""

from dataclasses import dataclass
from typing import Literal

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

    attention: AttentionSpec
    mlp: MlpSpec
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
