"""DeepSeek-V3 and R1: transformers `DeepseekV3ForCausalLM`. Latent attention; sigmoid experts, a correction bias."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from phalanx.models.hf_config import assemble, flag, integer, number, unsupported
from phalanx.models.hf_mla import LATENT_MOE, read_mla
from phalanx.models.hf_moe import first_dense_mlps, moe_locate, read_extra_layers, sigmoid_router
from phalanx.models.spec import DecoderConfig, LayerSpec, NormSpec
from phalanx.models.weights import Target

TINY = {
    "model_type": "deepseek_v3",
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "rope_scaling": {
        "type": "yarn",
        "factor": 8.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.8,
        "mscale_all_dim": 1.2,
        "original_max_position_embeddings": 32,
    },
    "attention_bias": True,
    "tie_word_embeddings": False,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
}


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Translate a DeepSeek-V3 config.

    Raises:
        CheckpointError: a field is missing or not supported.
    """
    for field, supported in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if hf.get(field, supported) != supported:
            raise unsupported(field, hf[field], supported)
    attention = read_mla(hf, interleaved=flag(hf, "rope_interleave", True))
    norms = NormSpec(eps=number(hf, "rms_norm_eps", 1e-6))
    router = sigmoid_router(hf, integer(hf, "n_group", 8), integer(hf, "topk_group", 4))
    layers = [LayerSpec(attention=attention, mlp=mlp, norms=norms) for mlp in first_dense_mlps(hf, router)]
    return dataclasses.replace(assemble(hf, layers), num_extra_layers=read_extra_layers(hf))


def locate(key: str) -> Target | None:
    """DeepSeek's names; layers past the last one are multi-token prediction and skipped by the loader."""
    return moe_locate(key, LATENT_MOE)
