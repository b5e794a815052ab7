"""Pyramid-residual mixture of experts (PR-MoE): Qwen3's attention and norms, more experts in deeper layers, and in each
layer with experts a dense feed-forward that every token passes, mixed with them by two learned coefficients.

Source: DeepSpeed-MoE (arXiv:2201.05596) sec. 4. transformers has no class for it, so config and names are ours:

    num_experts     int, or a list with one number per layer (pyramid); 0 = a dense layer
    residual_mlp    true: a layer with experts is c0 * experts(x) + c1 * mlp(x), c = softmax(coefficient(x)), its mlp as
                    wide as a dense layer (`intermediate_size`); false: experts alone
    task_experts    optional, [tasks][layers with experts][num_experts_per_tok]: experts by the task of a request; no
                    router tensors then, `norm_topk_prob` says nothing (task-level routing, arXiv:2110.03742)
    task_weights    optional, numbers of the same shape; without them all weights are 1 / num_experts_per_tok
    others          as Qwen3-MoE (`moe_intermediate_size`, `num_experts_per_tok`, `norm_topk_prob`, ...), but for
                    `decoder_sparse_step` and `mlp_only_layers`, in whose place `num_experts` is

    model.layers.<i>.mlp.{gate,up,down}_proj.weight                   a dense layer
    model.layers.<i>.mlp.gate.weight                                  (experts, hidden), the router
    model.layers.<i>.mlp.experts.<e>.{gate,up,down}_proj.weight
    model.layers.<i>.mlp.residual_mlp.{gate,up,down}_proj.weight
    model.layers.<i>.mlp.coefficient.{weight,bias}                    (2, hidden) and (2): experts first
"""

from collections.abc import Mapping
from typing import Any

from phalanx.errors import CheckpointError
from phalanx.models.hf_config import assemble, flag, integer, number, read_activation
from phalanx.models.hf_moe import EXPERT_PARTS, MOE, Names, moe_locate, read_experts, read_tasks, softmax_router
from phalanx.models.qwen3_moe import attention_spec
from phalanx.models.spec import DecoderConfig, LayerSpec, MlpSpec, NormSpec
from phalanx.models.weights import WHOLE, Target
from phalanx.moe.spec import MoeSpec, SharedSpec

TINY = {
    "model_type": "pr_moe",
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_experts": [3, 0, 5, 8],
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "residual_mlp": True,
}

NAMES: Names = {
    **MOE,
    **{
        f"mlp.residual_mlp.{name}": (f"mlp.shared.{param}", segments)
        for name, (param, segments) in EXPERT_PARTS.items()
        if name.endswith("_proj")
    },
    "mlp.coefficient": ("mlp.coefficients", WHOLE),
}


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Translate a PR-MoE config.

    Raises:
        CheckpointError: a field is missing or not supported.
        ConfigError: a layer has fewer experts than a token visits.
    """
    attention, norms = attention_spec(hf), NormSpec(eps=number(hf, "rms_norm_eps", 1e-6))
    dense = MlpSpec(intermediate_size=integer(hf, "intermediate_size"), activation=read_activation(hf))
    shared = SharedSpec(intermediate_size=dense.intermediate_size) if flag(hf, "residual_mlp") else None
    counts = _counts(hf)
    tasks = iter(read_tasks(hf, [count for count in counts if count]))
    mlps = [
        MoeSpec(
            router=softmax_router({**hf, "num_experts": count}),
            experts=read_experts(hf),
            shared=shared,
            residual=shared is not None,
            tasks=next(tasks),
        )
        if count
        else dense
        for count in counts
    ]
    return assemble(hf, [LayerSpec(attention=attention, mlp=mlp, norms=norms) for mlp in mlps])


def locate(key: str) -> Target | None:
    """The names above; attention and norms as Llama's."""
    return moe_locate(key, NAMES)


def _counts(hf: Mapping[str, Any]) -> list[int]:
    """Experts of every layer."""
    num_layers, value = integer(hf, "num_hidden_layers"), hf.get("num_experts")
    counts: list[Any] = value if isinstance(value, list) else [value] * num_layers
    if len(counts) != num_layers or not all(type(count) is int and count >= 0 for count in counts):
        raise CheckpointError(
            f"config.json: num_experts must be a number, or one for each of {num_layers} layers, not {value!r}"
        )
    return counts
