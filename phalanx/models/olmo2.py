"""OLMo 2: transformers `Olmo2ForCausalLM`. Llama with norms after the blocks only, and over all of q and of k."""

from collections.abc import Mapping
from typing import Any

from phalanx.models.hf_config import assemble, flag, integer, number, read_activation, read_head_dim, read_rope
from phalanx.models.spec import AttentionSpec, DecoderConfig, LayerSpec, MlpSpec, NormSpec
from phalanx.models.weights import LLAMA, OUT_NORMS, Target, llama_locate

TINY = {
    "model_type": "olmo2",
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
}


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Translate an OLMo 2 config.

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
            qk_norm="full",
        ),
        mlp=MlpSpec(intermediate_size=integer(hf, "intermediate_size"), activation=read_activation(hf)),
        norms=NormSpec(attn_in=False, attn_out=True, mlp_in=False, mlp_out=True, eps=number(hf, "rms_norm_eps", 1e-5)),
    )
    return assemble(hf, [layer] * integer(hf, "num_hidden_layers"))


def locate(key: str) -> Target | None:
    """Llama's names, with norms after the blocks, q_norm and k_norm."""
    return llama_locate(key, {**LLAMA, **OUT_NORMS})
