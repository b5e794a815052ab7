"""Gemma 3, text only: transformers `Gemma3ForCausalLM`.

Gemma 2 with a norm over each q and k head in place of the soft caps, and two rotary embeddings: windowed layers use
their own short base, full layers (every sixth) a long one, scaled in the bigger models.
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
from phalanx.models.spec import AttentionSpec, DecoderConfig, LayerSpec, MlpSpec, NormSpec, RopeSpec
from phalanx.models.weights import LLAMA, OUT_NORMS, Target, llama_locate

TINY = {
    "model_type": "gemma3_text",
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window": 9,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 30,
    "attention_bias": False,
    "tie_word_embeddings": True,
}


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Translate a Gemma 3 text config.

    Raises:
        CheckpointError: a field is missing or not supported.
    """
    for field in ("use_bidirectional_attention", "attn_logit_softcapping"):
        if hf.get(field):
            raise unsupported(field, hf[field], "causal models without a score cap")
    num_layers = integer(hf, "num_hidden_layers")
    head_dim = read_head_dim(hf, default=256)
    bias = flag(hf, "attention_bias")
    window = integer(hf, "sliding_window", 4096)
    ropes = _ropes(hf, head_dim)
    pattern = integer(hf, "sliding_window_pattern", 6)
    default = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(num_layers)]
    norms = NormSpec(attn_out=True, mlp_out=True, eps=number(hf, "rms_norm_eps", 1e-6), unit_offset=True)
    layers = [
        LayerSpec(
            attention=AttentionSpec(
                num_heads=integer(hf, "num_attention_heads"),
                num_kv_heads=integer(hf, "num_key_value_heads"),
                head_dim=head_dim,
                scale=number(hf, "query_pre_attn_scalar", 256) ** -0.5,
                rope=ropes[kind],
                window=window if kind == "sliding_attention" else None,
                qkv_bias=bias,
                o_bias=bias,
                qk_norm="head",
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
        logit_softcap=optional_number(hf, "final_logit_softcapping"),
    )


def _ropes(hf: Mapping[str, Any], head_dim: int) -> dict[str, RopeSpec]:
    """One rotary embedding per layer kind: nested `rope_parameters`, or the older flat fields."""
    nested = hf.get("rope_parameters") or {}
    full = {"rope_theta": hf.get("rope_theta") or 1e6, **(hf.get("rope_scaling") or {})}
    local = {"rope_theta": hf.get("rope_local_base_freq") or 1e4}
    return {
        "full_attention": read_rope(hf, head_dim, parameters={**full, **(nested.get("full_attention") or {})}),
        "sliding_attention": read_rope(hf, head_dim, parameters={**local, **(nested.get("sliding_attention") or {})}),
    }


def locate(key: str) -> Target | None:
    """Llama's names, with norms after the blocks, q_norm and k_norm."""
    return llama_locate(key, {**LLAMA, **OUT_NORMS})
