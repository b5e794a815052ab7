"""Qwen2 and Qwen2.5: transformers `Qwen2ForCausalLM`. Llama with biases on q, k, v and windows on the upper layers."""

from collections.abc import Mapping
from typing import Any

from phalanx.models.hf_config import (
    assemble,
    flag,
    integer,
    number,
    optional_integer,
    read_activation,
    read_head_dim,
    read_layer_types,
    read_rope,
    unsupported,
)
from phalanx.models.spec import AttentionSpec, DecoderConfig, LayerSpec, MlpSpec, NormSpec
from phalanx.models.weights import Target, llama_locate

TINY = {
    "model_type": "qwen2",
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_sliding_window": True,
    "sliding_window": 9,
    "max_window_layers": 2,
    "tie_word_embeddings": False,
}


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Translate a Qwen2 config.

    Raises:
        CheckpointError: a field is missing or not supported.
    """
    head_dim = read_head_dim(hf)
    rope = read_rope(hf, head_dim)
    mlp = MlpSpec(intermediate_size=integer(hf, "intermediate_size"), activation=read_activation(hf))
    norms = NormSpec(eps=number(hf, "rms_norm_eps", 1e-6))
    layers = [
        LayerSpec(
            attention=AttentionSpec(
                num_heads=integer(hf, "num_attention_heads"),
                num_kv_heads=integer(hf, "num_key_value_heads"),
                head_dim=head_dim,
                scale=head_dim**-0.5,
                rope=rope,
                window=window,
                qkv_bias=True,
            ),
            mlp=mlp,
            norms=norms,
        )
        for window in layer_windows(hf)
    ]
    return assemble(hf, layers)


def layer_windows(hf: Mapping[str, Any]) -> list[int | None]:
    """The window of each layer. `sliding_window` counts only with `use_sliding_window`, from `max_window_layers` up."""
    num_layers = integer(hf, "num_hidden_layers")
    window = optional_integer(hf, "sliding_window", 4096) if flag(hf, "use_sliding_window") else None
    first = hf.get("max_window_layers", 28)
    default = ["sliding_attention" if window and i >= first else "full_attention" for i in range(num_layers)]
    types = read_layer_types(hf, num_layers, default)
    if window is None and "sliding_attention" in types:
        raise unsupported("layer_types", "sliding_attention", "without use_sliding_window, only full_attention")
    return [window if kind == "sliding_attention" else None for kind in types]


def locate(key: str) -> Target | None:
    """Llama's names."""
    return llama_locate(key)
