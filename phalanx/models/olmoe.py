"""OLMoE: transformers `OlmoeForCausalLM`. Llama with norms over all of q and of k, and experts in every layer."""

from collections.abc import Mapping
from typing import Any

from phalanx.models.hf_config import assemble, flag, integer, number, read_head_dim, read_rope, unsupported
from phalanx.models.hf_moe import moe_locate, read_experts, softmax_router
from phalanx.models.spec import AttentionSpec, DecoderConfig, LayerSpec, NormSpec
from phalanx.models.weights import Target
from phalanx.moe.spec import MoeSpec

TINY = {
    "model_type": "olmoe",
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "clip_qkv": None,
    "tie_word_embeddings": False,
    "num_experts": 9,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
}


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Translate an OLMoE config.

    Raises:
        CheckpointError: a field is missing or not supported.
    """
    if hf.get("clip_qkv") is not None:
        raise unsupported("clip_qkv", hf["clip_qkv"], "null")
    head_dim, bias = read_head_dim(hf), flag(hf, "attention_bias")
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=integer(hf, "num_attention_heads"),
            num_kv_heads=integer(hf, "num_key_value_heads", hf.get("num_attention_heads")),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=read_rope(hf, head_dim),
            qkv_bias=bias,
            o_bias=bias,
            qk_norm="full",
        ),
        mlp=MoeSpec(router=softmax_router(hf), experts=read_experts(hf, "intermediate_size")),
        norms=NormSpec(eps=number(hf, "rms_norm_eps", 1e-5)),
    )
    return assemble(hf, [layer] * integer(hf, "num_hidden_layers"))


def locate(key: str) -> Target | None:
    """Llama's names with q_norm and k_norm, and those of its experts."""
    return moe_locate(key)
