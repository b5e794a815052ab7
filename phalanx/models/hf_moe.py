"""Read the mixture-of-experts part of a Hugging Face config and its tensor names: shared by the families that have one.

No torch here: the planner reads configs, too.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from phalanx.errors import CheckpointError
from phalanx.models.hf_config import flag, integer, number, read_activation, unsupported
from phalanx.models.spec import MlpSpec
from phalanx.models.weights import EVERY, LLAMA, WHOLE, Stacking, Target, llama_locate, split_layer
from phalanx.moe.spec import ExpertSpec, MoeSpec, RouterSpec, SharedSpec, TaskSpec

Names = Mapping[str, tuple[str, tuple[str, ...]]]

NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Spellings of one field."""

EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.(weight|bias)")
"""One tensor of one expert, after the layer."""

EXPERTS = re.compile(r"mlp\.experts\.(gate_up_proj|down_proj)(_bias)?")
"""One tensor of all experts."""

EXPERT_PARTS: Names = {
    "gate_proj": ("gate_up_proj", ("gate",)),
    "up_proj": ("gate_up_proj", ("up",)),
    "down_proj": ("down_proj", WHOLE),
    "w1": ("gate_up_proj", ("gate",)),
    "w3": ("gate_up_proj", ("up",)),
    "w2": ("down_proj", WHOLE),
}
STACKED_PARTS: Mapping[str, tuple[str, ...]] = {"gate_up_proj": ("gate", "up"), "down_proj": WHOLE}

BARE: Mapping[str, str] = {
    "mlp.gate.e_score_correction_bias": "mlp.correction_bias",
    "self_attn.sinks": "attention.sinks",
}
"""Names that do not end in weight or bias."""

MOE: Names = {
    **LLAMA,
    "mlp.gate": ("mlp.gate", WHOLE),
    "mlp.router": ("mlp.gate", WHOLE),
    "block_sparse_moe.gate": ("mlp.gate", WHOLE),
    "mlp.shared_expert_gate": ("mlp.shared_gate", WHOLE),
    **{
        f"mlp.{shared}.{name}": (f"mlp.shared.{param}", segments)
        for shared in ("shared_expert", "shared_experts")
        for name, (param, segments) in EXPERT_PARTS.items()
        if name.endswith("_proj")
    },
}
"""Names of a layer with experts: as of a Llama layer, and the modules of its feed-forward."""


def moe_locate(key: str, layer_names: Names = MOE, stacking: Stacking | None = None) -> Target | None:
    """Place a tensor of a model with experts, stored expert by expert or all in one.

    Args:
        key: its name.
        layer_names: of the modules of a layer.
        stacking: how a tensor of all experts lies; None = gate rows then up rows, as `torch.nn.Linear` has them.

    Raises:
        CheckpointError: the name is unknown.
    """
    layer, rest = split_layer(key)
    if layer is None:
        return llama_locate(key)
    if rest in BARE:
        return Target(BARE[rest], WHOLE, layer)
    one, all_of_them = EXPERT.fullmatch(rest), EXPERTS.fullmatch(rest)
    if one is not None and one[2] in EXPERT_PARTS:
        param, segments = EXPERT_PARTS[one[2]]
        expert = int(one[1])
        return Target(f"mlp.experts.{expert}.{param}.{one[3]}", segments, layer, expert)
    if all_of_them is not None:
        param, kind = all_of_them[1], "bias" if all_of_them[2] else "weight"
        segments = STACKED_PARTS[param]
        return Target(f"mlp.experts.{EVERY}.{param}.{kind}", segments, layer, stacking=stacking or Stacking())
    return llama_locate(key, layer_names)


def read_num_experts(hf: Mapping[str, Any]) -> int:
    """The number of routed experts, under whichever of its names."""
    return integer(hf, next((name for name in NUM_EXPERTS if hf.get(name) is not None), NUM_EXPERTS[0]))


def softmax_router(hf: Mapping[str, Any]) -> RouterSpec:
    """Of Qwen's families and OLMoE: softmax over all experts, renormalised if the config says so."""
    return RouterSpec(
        num_experts=read_num_experts(hf),
        top_k=integer(hf, "num_experts_per_tok"),
        normalise="sum" if flag(hf, "norm_topk_prob") else "none",
        weights_in_model_dtype=True,
    )


def sigmoid_router(hf: Mapping[str, Any], num_groups: int, top_groups: int) -> RouterSpec:
    """Of DeepSeek-V3 and GLM-4.5: sigmoid in fp32, a correction bias that selects and never weights, best groups.

    Args:
        hf: the whole config.
        num_groups: of experts.
        top_groups: that a token may visit.
    """
    return RouterSpec(
        num_experts=read_num_experts(hf),
        top_k=integer(hf, "num_experts_per_tok", 8),
        score="sigmoid",
        use_bias=True,
        num_groups=num_groups,
        top_groups=top_groups,
        group_score="top2_sum",
        normalise="sum" if flag(hf, "norm_topk_prob", True) else "none",
        eps=1e-20,
        scale=number(hf, "routed_scaling_factor", 1.0),
        gate_dtype="float32",
    )


def read_experts(hf: Mapping[str, Any], field: str = "moe_intermediate_size") -> ExpertSpec:
    """A routed expert; `field` holds its inner width."""
    return ExpertSpec(intermediate_size=integer(hf, field), activation=read_activation(hf))


def read_tasks(hf: Mapping[str, Any], num_experts: Sequence[int]) -> list[TaskSpec | None]:
    """`task_experts` and `task_weights`, of each layer with experts; None where the config has no tasks.

    Args:
        hf: the whole config.
        num_experts: of each layer with experts.

    Raises:
        CheckpointError: a table of another shape, an expert that is none of the layer's or comes twice, a weight
            outside -1e9 ... 1e9, tables where no layer has experts.
    """
    tables: Any = hf.get("task_experts")
    weights: Any = hf.get("task_weights")
    top_k = integer(hf, "num_experts_per_tok")
    if tables is None and weights is None:
        return [None] * len(num_experts)
    if not num_experts:
        raise CheckpointError("config.json: task_experts and task_weights need layers with experts; there are none")
    _check_table("task_experts", tables, len(num_experts), top_k, (int,))
    for task, table in enumerate(tables):
        for layer, (ids, count) in enumerate(zip(table, num_experts, strict=True)):
            if len(set(ids)) < top_k or not all(0 <= expert < count for expert in ids):
                raise CheckpointError(
                    f"config.json: task_experts[{task}][{layer}] ({ids}) must be {top_k} different experts from 0 to "
                    f"{count - 1}"
                )
    if weights is not None:
        _check_table("task_weights", weights, len(num_experts), top_k, (int, float))
        if len(weights) != len(tables):
            raise CheckpointError(
                f"config.json: task_weights are of {len(weights)} tasks, task_experts of {len(tables)}"
            )
    return [
        TaskSpec(
            experts=tuple(tuple(table[layer]) for table in tables),
            weights=None if weights is None else tuple(tuple(map(float, table[layer])) for table in weights),
        )
        for layer in range(len(num_experts))
    ]


def _check_table(field: str, value: object, num_layers: int, top_k: int, kinds: tuple[type, ...]) -> None:
    tables = value if isinstance(value, list) else []
    rows = [row for table in tables if isinstance(table, list) and len(table) == num_layers for row in table]
    is_sound = all(
        isinstance(row, list)
        and len(row) == top_k
        and all(type(entry) in kinds and -1e9 <= entry <= 1e9 for entry in row)  # integers may be of any size
        for row in rows
    )
    if not tables or len(rows) != len(tables) * num_layers or not is_sound:
        raise CheckpointError(
            f"config.json: {field} must be a list of tasks, each of {num_layers} lists (one for each layer with "
            f"experts) of {top_k} numbers"
        )


def sparse_step_mlps(hf: Mapping[str, Any], moe: MoeSpec) -> list[MlpSpec | MoeSpec]:
    """Every `decoder_sparse_step`-th layer has experts, unless `mlp_only_layers` names it (Qwen's families)."""
    dense = MlpSpec(intermediate_size=integer(hf, "intermediate_size"), activation=read_activation(hf))
    step, only = integer(hf, "decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    if not isinstance(only, list) or not all(isinstance(index, int) for index in only):
        raise unsupported("mlp_only_layers", only, "a list of layer indices")
    layers = range(integer(hf, "num_hidden_layers"))
    return [moe if (index + 1) % step == 0 and index not in only else dense for index in layers]


def first_dense_mlps(hf: Mapping[str, Any], router: RouterSpec) -> list[MlpSpec | MoeSpec]:
    """The first `first_k_dense_replace` layers are dense, the others have experts and a shared one (DeepSeek, GLM)."""
    if hf.get("moe_layer_freq", 1) != 1:
        raise unsupported("moe_layer_freq", hf["moe_layer_freq"], "1")
    experts, dense = read_experts(hf), hf.get("first_k_dense_replace")
    if isinstance(dense, bool) or not isinstance(dense, int) or dense < 0:
        raise CheckpointError(f"config.json: first_k_dense_replace must be a number of layers, not {dense!r}")
    shared = SharedSpec(intermediate_size=experts.intermediate_size * integer(hf, "n_shared_experts"))
    moe = MoeSpec(router=router, experts=experts, shared=shared)
    mlp = MlpSpec(intermediate_size=integer(hf, "intermediate_size"), activation=read_activation(hf))
    layers = range(integer(hf, "num_hidden_layers"))
    return [mlp if index < dense else moe for index in layers]


def read_extra_layers(hf: Mapping[str, Any]) -> int:
    """Multi-token prediction layers past the last one; checkpoints of DeepSeek-V3 and GLM-4.5 have one by default."""
    value = hf.get("num_nextn_predict_layers", hf.get("num_mtp_layers"))
    return integer({"num_nextn_predict_layers": value}, "num_nextn_predict_layers", 1) if value != 0 else 0
