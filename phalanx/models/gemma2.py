"""Gemma 2: transformers `Gemma2ForCausalLM`.

Norms before and after each block with stored weight `w - 1`, a scaled tied embedding, soft caps on scores and logits,
and a sliding window on every second layer, starting with the first.
"""

from collections.abc import Mapping
from typing import Any

from phalanx.models.hf_config import (
    assemble,
    flag,
    integer,
    number,
    optional_number,
    read_activation,
    read_head_dim,
    read_layer_types,
    read_rope,
    unsupported,
)
from phalanx.models.spec import AttentionSpec, DecoderConfig, LayerSpec, MlpSpec, NormSpec
from phalanx.models.weights import LLAMA, OUT_NORMS, Target, llama_locate

TINY = {
    "model_type": "gemma2",
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 9,
    "query_pre_attn_scalar": 30,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 2.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
}


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Translate a Gemma 2 config.

    Raises:
        CheckpointError: a field is missing or not supported.
    """
    if hf.get("use_bidirectional_attention"):
        raise unsupported("use_bidirectional_attention", True, "causal models")
    num_layers = integer(hf, "num_hidden_layers")
    head_dim = read_head_dim(hf, default=256)
    bias = flag(hf, "attention_bias")
    rope = read_rope(hf, head_dim)
    window = integer(hf, "sliding_window", 4096)
    norms = NormSpec(attn_out=True, mlp_out=True, eps=number(hf, "rms_norm_eps", 1e-6), unit_offset=True)
    default = ["full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)]
    layers = [
        LayerSpec(
            attention=AttentionSpec(
                num_heads=integer(hf, "num_attention_heads"),
                num_kv_heads=integer(hf, "num_key_value_heads"),
                head_dim=head_dim,
                scale=number(hf, "query_pre_attn_scalar", 256) ** -0.5,
                rope=rope,
                window=window if kind == "sliding_attention" else None,
                softcap=optional_number(hf, "attn_logit_softcapping", 50.0),
                qkv_bias=bias,
                o_bias=bias,
            ),
            mlp=MlpSpec(
                intermediate_size=integer(hf, "intermediate_size"),
                activation=read_activation(hf, "hidden_activation", "gelu_pytorch_tanh"),
            ),
            norms=norms,
        )
        for kind in read_layer_types(hf, num_layers, default)
    ]
    return assemble(
        hf,
        layers,
        unit_offset=True,
        tied=True,
        embed_scale=integer(hf, "hidden_size") ** 0.5,
        logit_softcap=optional_number(hf, "final_logit_softcapping", 30.0),
    )


def locate(key: str) -> Target | None:
    """Llama's names, with norms after the blocks."""
    return llama_locate(key, {**LLAMA, **OUT_NORMS})
