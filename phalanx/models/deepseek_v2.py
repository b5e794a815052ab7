"""DeepSeek-V2: transformers `DeepseekV2ForCausalLM`. Latent attention; softmax experts, of the best groups or all."""

from collections.abc import Mapping
from typing import Any

from phalanx.models.hf_config import assemble, flag, integer, number, unsupported
from phalanx.models.hf_mla import LATENT_MOE, read_mla
from phalanx.models.hf_moe import first_dense_mlps, moe_locate, read_num_experts
from phalanx.models.spec import DecoderConfig, LayerSpec, NormSpec
from phalanx.models.weights import Target
from phalanx.moe.spec import RouterSpec

TINY = {
    "model_type": "deepseek_v2",
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
    "attention_bias": True,
    "tie_word_embeddings": False,
    "q_lora_rank": None,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 20,
    "routed_scaling_factor": 1.5,
    "topk_method": "group_limited_greedy",
    "n_group": 3,
    "topk_group": 2,
    "norm_topk_prob": False,
}


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Translate a DeepSeek-V2 config.

    Raises:
        CheckpointError: a field is missing or not supported.
    """
    if flag(hf, "mlp_bias"):
        raise unsupported("mlp_bias", True, "false")
    attention, norms = read_mla(hf, interleaved=True), NormSpec(eps=number(hf, "rms_norm_eps", 1e-6))
    layers = [LayerSpec(attention=attention, mlp=mlp, norms=norms) for mlp in first_dense_mlps(hf, _router(hf))]
    return assemble(hf, layers)


def _router(hf: Mapping[str, Any]) -> RouterSpec:
    method = hf.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise unsupported("topk_method", method, "greedy and group_limited_greedy")
    if hf.get("scoring_func", "softmax") != "softmax":
        raise unsupported("scoring_func", hf["scoring_func"], "softmax")
    if flag(hf, "norm_topk_prob"):
        # transformers reads the field and never renormalises; what such a checkpoint was trained with is unknown.
        raise unsupported("norm_topk_prob", True, "false")
    grouped = method == "group_limited_greedy"
    return RouterSpec(
        num_experts=read_num_experts(hf),
        top_k=integer(hf, "num_experts_per_tok"),
        num_groups=integer(hf, "n_group") if grouped else 1,
        top_groups=integer(hf, "topk_group") if grouped else 1,
        group_score="max",
        group_mask=0.0,
        scale=number(hf, "routed_scaling_factor", 1.0),
        gate_dtype="float32",
    )


def locate(key: str) -> Target | None:
    """DeepSeek's names."""
    return moe_locate(key, LATENT_MOE)
