"""GLM-4.5: transformers `Glm4MoeForCausalLM`. Half of a head rotates; experts as in DeepSeek-V3 after dense layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from phalanx.models.hf_config import assemble, flag, integer, number, read_head_dim, read_rope
from phalanx.models.hf_moe import first_dense_mlps, moe_locate, read_extra_layers, sigmoid_router
from phalanx.models.spec import AttentionSpec, DecoderConfig, LayerSpec, NormSpec
from phalanx.models.weights import Target

TINY = {
    "model_type": "glm4_moe",
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "partial_rotary_factor": 0.5,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "attention_bias": True,
    "use_qk_norm": True,
    "tie_word_embeddings": False,
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 40,
    "routed_scaling_factor": 1.5,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
}


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Translate a GLM-4.5 config.

    Raises:
        CheckpointError: a field is missing or not supported.
    """
    head_dim = read_head_dim(hf)
    attention = AttentionSpec(
        num_heads=integer(hf, "num_attention_heads"),
        num_kv_heads=integer(hf, "num_key_value_heads"),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read_rope({"partial_rotary_factor": 0.5, **hf}, head_dim, partial=True),
        qkv_bias=flag(hf, "attention_bias"),
        qk_norm="head" if flag(hf, "use_qk_norm") else "none",
    )
    norms = NormSpec(eps=number(hf, "rms_norm_eps", 1e-5))
    router = sigmoid_router(hf, integer(hf, "n_group", 1), integer(hf, "topk_group", 1))
    layers = [LayerSpec(attention=attention, mlp=mlp, norms=norms) for mlp in first_dense_mlps(hf, router)]
    return dataclasses.replace(assemble(hf, layers), num_extra_layers=read_extra_layers(hf))


def locate(key: str) -> Target | None:
    """Llama's names with q_norm and k_norm, and those of its experts."""
    return moe_locate(key)
