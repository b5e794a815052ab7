"""gpt-oss: transformers `GptOssForCausalLM`. Attention sinks, every other layer windowed, clamped experts with biases.

OpenAI's own files hold the experts in mxfp4 (`quantized.py`); bf16 conversions of them load, too.
"""

from collections.abc import Mapping
from typing import Any

from phalanx.models.hf_config import (
    assemble,
    flag,
    integer,
    number,
    optional_integer,
    read_head_dim,
    read_layer_types,
    read_rope,
    unsupported,
)
from phalanx.models.hf_moe import moe_locate, read_num_experts
from phalanx.models.spec import AttentionSpec, DecoderConfig, LayerSpec, NormSpec
from phalanx.models.weights import Stacking, Target
from phalanx.moe.spec import ExpertSpec, MoeSpec, RouterSpec

TINY = {
    "model_type": "gpt_oss",
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    },
    "attention_bias": True,
    "sliding_window": 9,
    "swiglu_limit": 1.25,
    "tie_word_embeddings": False,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
}

INTERLEAVED = Stacking(transposed=True, interleaved=True)
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""What a config without any rope parameters means."""


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Translate a gpt-oss config.

    Raises:
        CheckpointError: a field is missing or not supported.
    """
    if hf.get("hidden_act", "silu") != "silu":
        raise unsupported("hidden_act", hf["hidden_act"], "silu")
    head_dim, bias = read_head_dim(hf, default=64), flag(hf, "attention_bias", True)
    if not hf.get("rope_scaling") and not hf.get("rope_parameters"):
        hf = {**hf, "rope_scaling": YARN}
    rope, norms = read_rope(hf, head_dim, default_theta=150_000.0), NormSpec(eps=number(hf, "rms_norm_eps", 1e-5))
    moe = _moe(hf)
    layers = [
        LayerSpec(
            attention=AttentionSpec(
                num_heads=integer(hf, "num_attention_heads"),
                num_kv_heads=integer(hf, "num_key_value_heads"),
                head_dim=head_dim,
                scale=head_dim**-0.5,
                rope=rope,
                window=window,
                qkv_bias=bias,
                o_bias=bias,
                sinks=True,
            ),
            mlp=moe,
            norms=norms,
        )
        for window in _windows(hf)
    ]
    return assemble(hf, layers)


def _moe(hf: Mapping[str, Any]) -> MoeSpec:
    """The best k by logit, weighted by the softmax of those k."""
    router = RouterSpec(
        num_experts=read_num_experts(hf),
        top_k=integer(hf, "num_experts_per_tok", 4),
        score="none",
        normalise="softmax",
        gate_bias=True,
        weights_in_model_dtype=True,
    )
    experts = ExpertSpec(
        intermediate_size=integer(hf, "intermediate_size"),
        activation="swiglu_clamped",
        bias=True,
        alpha=number(hf, "swiglu_alpha", 1.702),
        limit=number(hf, "swiglu_limit", 7.0),
    )
    return MoeSpec(router=router, experts=experts)


def _windows(hf: Mapping[str, Any]) -> list[int | None]:
    num_layers = integer(hf, "num_hidden_layers")
    window = optional_integer(hf, "sliding_window", 128)
    default = ["full_attention" if index % 2 else "sliding_attention" for index in range(num_layers)]
    types = read_layer_types(hf, num_layers, default)
    return [window if kind == "sliding_attention" else None for kind in types]


def locate(key: str) -> Target | None:
    """Llama's names with sinks, and all experts of a layer in one transposed tensor, gate and up columns in turn."""
    return moe_locate(key, stacking=INTERLEAVED)
