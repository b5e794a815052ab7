"""Qwen3-MoE: transformers `Qwen3MoeForCausalLM`. Qwen3 with experts in some layers or all, one window or none."""

from collections.abc import Mapping
from typing import Any

from phalanx.models.hf_config import assemble, flag, integer, number, optional_integer, read_head_dim, read_rope
from phalanx.models.hf_moe import moe_locate, read_experts, softmax_router, sparse_step_mlps
from phalanx.models.spec import AttentionSpec, DecoderConfig, LayerSpec, NormSpec
from phalanx.models.weights import Target
from phalanx.moe.spec import MoeSpec

TINY = {
    "model_type": "qwen3_moe",
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
}


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Translate a Qwen3-MoE config.

    Raises:
        CheckpointError: a field is missing or not supported.
    """
    attention = attention_spec(hf)
    norms = NormSpec(eps=number(hf, "rms_norm_eps", 1e-6))
    moe = MoeSpec(router=softmax_router(hf), experts=read_experts(hf))
    return assemble(hf, [LayerSpec(attention=attention, mlp=mlp, norms=norms) for mlp in sparse_step_mlps(hf, moe)])


def attention_spec(hf: Mapping[str, Any]) -> AttentionSpec:
    """Of every layer: Qwen3's, with one window or none."""
    head_dim = read_head_dim(hf)
    bias = flag(hf, "attention_bias")
    return AttentionSpec(
        num_heads=integer(hf, "num_attention_heads"),
        num_kv_heads=integer(hf, "num_key_value_heads"),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read_rope(hf, head_dim),
        window=optional_integer(hf, "sliding_window", 4096) if flag(hf, "use_sliding_window") else None,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
    )


def locate(key: str) -> Target | None:
    """Qwen3's names, and those of its experts."""
    return moe_locate(key)
