"""Qwen1.5-MoE and Qwen2-MoE: transformers `Qwen2MoeForCausalLM`. Qwen2 with experts and a gated shared one."""

from collections.abc import Mapping
from typing import Any

from phalanx.models.hf_config import (
    assemble,
    flag,
    integer,
    number,
    optional_integer,
    read_head_dim,
    read_layer_types,
    read_rope,
    unsupported,
)
from phalanx.models.hf_moe import moe_locate, read_experts, softmax_router, sparse_step_mlps
from phalanx.models.spec import AttentionSpec, DecoderConfig, LayerSpec, NormSpec
from phalanx.models.weights import Target
from phalanx.moe.spec import MoeSpec, SharedSpec

TINY = {
    "model_type": "qwen2_moe",
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
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 56,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [2],
}


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Translate a Qwen2-MoE config.

    Raises:
        CheckpointError: a field is missing or not supported.
    """
    head_dim = read_head_dim(hf)
    rope, norms = read_rope(hf, head_dim), NormSpec(eps=number(hf, "rms_norm_eps", 1e-6))
    shared = SharedSpec(intermediate_size=integer(hf, "shared_expert_intermediate_size"), gated=True)
    moe = MoeSpec(router=softmax_router(hf), experts=read_experts(hf), shared=shared)
    layers = [
        LayerSpec(
            attention=AttentionSpec(
                num_heads=integer(hf, "num_attention_heads"),
                num_kv_heads=integer(hf, "num_key_value_heads"),
                head_dim=head_dim,
                scale=head_dim**-0.5,
                rope=rope,
                window=window,
                qkv_bias=flag(hf, "qkv_bias", True),
            ),
            mlp=mlp,
            norms=norms,
        )
        for window, mlp in zip(_windows(hf), sparse_step_mlps(hf, moe), strict=True)
    ]
    return assemble(hf, layers)


def _windows(hf: Mapping[str, Any]) -> list[int | None]:
    """As transformers has it: with `use_sliding_window`, every other layer below `max_window_layers`, from the first.

    (The dense Qwen2 has windows from `max_window_layers` up.)
    """
    num_layers = integer(hf, "num_hidden_layers")
    window = optional_integer(hf, "sliding_window", 4096) if flag(hf, "use_sliding_window") else None
    last = hf.get("max_window_layers", 28)
    default = [
        "sliding_attention" if window and i % 2 == 0 and i < last else "full_attention" for i in range(num_layers)
    ]
    types = read_layer_types(hf, num_layers, default)
    if window is None and "sliding_attention" in types:
        raise unsupported("layer_types", "sliding_attention", "without use_sliding_window, only full_attention")
    return [window if kind == "sliding_attention" else None for kind in types]


def locate(key: str) -> Target | None:
    """Qwen2's names, and those of its experts."""
    return moe_locate(key)
