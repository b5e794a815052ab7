"""Mixtral: transformers `MixtralForCausalLM`. Mistral with experts in every layer, weights renormalised in fp32."""

from collections.abc import Mapping
from typing import Any

from phalanx.models.hf_config import assemble, integer, number, optional_integer, read_head_dim, read_rope
from phalanx.models.hf_moe import moe_locate, read_experts, read_num_experts
from phalanx.models.spec import AttentionSpec, DecoderConfig, LayerSpec, NormSpec
from phalanx.models.weights import Target
from phalanx.moe.spec import MoeSpec, RouterSpec

TINY = {
    "model_type": "mixtral",
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": 9,
    "tie_word_embeddings": False,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Translate a Mixtral config.

    Raises:
        CheckpointError: a field is missing or not supported.
    """
    head_dim = read_head_dim(hf)
    router = RouterSpec(num_experts=read_num_experts(hf), top_k=integer(hf, "num_experts_per_tok", 2), normalise="sum")
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=integer(hf, "num_attention_heads"),
            num_kv_heads=integer(hf, "num_key_value_heads"),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=read_rope(hf, head_dim, default_theta=1_000_000.0),
            window=optional_integer(hf, "sliding_window"),
        ),
        mlp=MoeSpec(router=router, experts=read_experts(hf, "intermediate_size")),
        norms=NormSpec(eps=number(hf, "rms_norm_eps", 1e-5)),
    )
    return assemble(hf, [layer] * integer(hf, "num_hidden_layers"))


def locate(key: str) -> Target | None:
    """Llama's names, and `block_sparse_moe` with experts of w1, w3 (gate, up) and w2 (down)."""
    return moe_locate(key)
