"""Llama 2, 3, 3.1 to 3.3: transformers `LlamaForCausalLM`. The plain decoder all others are described against."""

from collections.abc import Mapping
from typing import Any

from phalanx.models.hf_config import assemble, flag, integer, number, read_activation, read_head_dim, read_rope
from phalanx.models.spec import AttentionSpec, DecoderConfig, LayerSpec, MlpSpec, NormSpec
from phalanx.models.weights import Target, llama_locate

TINY = {
    "model_type": "llama",
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
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
}


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Translate a Llama config.

    Raises:
        CheckpointError: a field is missing or not supported.
    """
    head_dim = read_head_dim(hf)
    bias = flag(hf, "attention_bias")
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=integer(hf, "num_attention_heads"),
            num_kv_heads=integer(hf, "num_key_value_heads", hf.get("num_attention_heads")),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=read_rope(hf, head_dim),
            qkv_bias=bias,
            o_bias=bias,
        ),
        mlp=MlpSpec(
            intermediate_size=integer(hf, "intermediate_size"),
            activation=read_activation(hf),
            bias=flag(hf, "mlp_bias"),
        ),
        norms=NormSpec(eps=number(hf, "rms_norm_eps", 1e-6)),
    )
    return assemble(hf, [layer] * integer(hf, "num_hidden_layers"))


def locate(key: str) -> Target | None:
    """Llama's own names."""
    return llama_locate(key)
