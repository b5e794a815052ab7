"""Mistral 7B and its like: transformers `MistralForCausalLM`. Llama with one sliding window on all layers (or none)."""

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
from phalanx.models.weights import Target, llama_locate

TINY = {
    "model_type": "mistral",
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 9,
    "tie_word_embeddings": False,
}


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Translate a Mistral config.

    Raises:
        CheckpointError: a field is missing or not supported.
    """
    if hf.get("layer_types") is not None:
        raise unsupported("layer_types", hf["layer_types"], "mistral with one window for all layers")
    head_dim = read_head_dim(hf)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=integer(hf, "num_attention_heads"),
            num_kv_heads=integer(hf, "num_key_value_heads"),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=read_rope(hf, head_dim),
            window=optional_integer(hf, "sliding_window", 4096),
        ),
        mlp=MlpSpec(intermediate_size=integer(hf, "intermediate_size"), activation=read_activation(hf)),
        norms=NormSpec(eps=number(hf, "rms_norm_eps", 1e-6)),
    )
    return assemble(hf, [layer] * integer(hf, "num_hidden_layers"))


def locate(key: str) -> Target | None:
    """Llama's names."""
    return llama_locate(key)
