"""Qwen3, dense: transformers `Qwen3ForCausalLM`. Llama with a norm over each q and k head."""

from collections.abc import Mapping
from typing import Any

from phalanx.models.hf_config import assemble, flag, integer, number, read_activation, read_head_dim, read_rope
from phalanx.models.qwen2 import layer_windows
from phalanx.models.spec import AttentionSpec, DecoderConfig, LayerSpec, MlpSpec, NormSpec
from phalanx.models.weights import Target, llama_locate

TINY = {
    "model_type": "qwen3",
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
}


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Translate a Qwen3 config.

    Raises:
        CheckpointError: a field is missing or not supported.
    """
    head_dim = read_head_dim(hf, default=128)
    bias = flag(hf, "attention_bias")
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
                qkv_bias=bias,
                o_bias=bias,
                qk_norm="head",
            ),
            mlp=mlp,
            norms=norms,
        )
        for window in layer_windows(hf)
    ]
    return assemble(hf, layers)


def locate(key: str) -> Target | None:
    """Llama's names, with q_norm and k_norm."""
    return llama_locate(key)
