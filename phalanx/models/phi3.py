"""Phi-3 and Phi-4 without long rope: transformers `Phi3ForCausalLM`.

Llama with q, k, v in one tensor on disk, gate and up in another, and a rotary embedding on a part of each head.
"""

from collections.abc import Mapping
from typing import Any

from phalanx.models.hf_config import (
    assemble,
    integer,
    number,
    optional_integer,
    read_activation,
    read_head_dim,
    read_rope,
    unsupported,
)
from phalanx.models.spec import AttentionSpec, DecoderConfig, LayerSpec, MlpSpec, NormSpec
from phalanx.models.weights import LLAMA, Target, llama_locate

TINY = {
    "model_type": "phi3",
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "sliding_window": 9,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Translate a Phi-3 config.

    Raises:
        CheckpointError: a field is missing or not supported, long rope above all.
    """
    head_dim = read_head_dim(hf)
    rope = read_rope(hf, head_dim, partial=True)
    if rope.scaling != "default":
        raise unsupported("rope_scaling.rope_type", rope.scaling, "phi3 without rope scaling")
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=integer(hf, "num_attention_heads"),
            num_kv_heads=integer(hf, "num_key_value_heads", hf.get("num_attention_heads")),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=rope,
            window=optional_integer(hf, "sliding_window"),
        ),
        mlp=MlpSpec(intermediate_size=integer(hf, "intermediate_size"), activation=read_activation(hf)),
        norms=NormSpec(eps=number(hf, "rms_norm_eps", 1e-5)),
    )
    return assemble(hf, [layer] * integer(hf, "num_hidden_layers"))


def locate(key: str) -> Target | None:
    """Llama's names, with two fused tensors."""
    fused = {
        "self_attn.qkv_proj": ("attention.qkv_proj", ("q", "k", "v")),
        "mlp.gate_up_proj": ("mlp.gate_up_proj", ("gate", "up")),
    }
    return llama_locate(key, {**LLAMA, **fused})
