"""What a mixture-of-experts block is, as data: family files fill it from the Hugging Face config. No torch here."""

import math
from dataclasses import dataclass
from typing import Literal

from phalanx.errors import ConfigError

Score = Literal["softmax", "sigmoid", "sqrtsoftplus", "none"]
GroupScore = Literal["max", "top2_sum"]
Normalise = Literal["none", "sum", "max_sum", "softmax"]
CapacityRule = Literal["gshard", "vmoe", "tutel", "nllb"]
Priority = Literal["fifo", "bpr", "probs"]
Overflow = Literal["drop", "next"]
ExpertActivation = Literal["silu", "gelu_tanh", "swiglu_clamped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """From router logits to k experts and their weights; `routers.topk.route` follows it step by step.

    Attributes:
        num_experts, top_k: logical experts of the layer; experts per token.
        score: of the logits, fp32; "none" selects on the logits themselves.
        use_bias: the checkpoint has a correction bias: it takes part in the selection and never in the weights.
        num_groups, top_groups: group-limited routing; 1 group = off.
        group_score: of a group: its best expert, or the sum of its best two.
        group_mask: selection score of the experts of other groups: -inf or 0.0.
        normalise: of the k weights: none; by `sum + eps`; by `max(sum, min_sum)`; softmax over the k selected logits.
        scale: factor of the weights, last.
        gate_dtype: of the gate's product: "model" or "float32".
        gate_bias: the gate is a linear layer with bias.
        weights_in_model_dtype: weights are rounded to the model's dtype, as transformers does.

    Raises:
        ConfigError: a rule that cannot choose top_k experts.
    """

    num_experts: int
    top_k: int
    score: Score = "softmax"
    use_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "max"
    group_mask: float = float("-inf")
    normalise: Normalise = "none"
    eps: float = 0.0
    min_sum: float = 0.0
    scale: float = 1.0
    gate_dtype: Literal["model", "float32"] = "model"
    gate_bias: bool = False
    weights_in_model_dtype: bool = False

    def __post_init__(self) -> None:
        group_size = self.num_experts // max(self.num_groups, 1)
        reachable = self.top_groups * group_size
        for wrong, message in (
            (self.num_experts < 1, f"num_experts ({self.num_experts}) must be at least 1"),
            (
                self.num_groups < 1 or self.num_experts % self.num_groups != 0,
                f"num_experts ({self.num_experts}) is not divisible by num_groups ({self.num_groups})",
            ),
            (
                not 1 <= self.top_groups <= self.num_groups,
                f"top_groups ({self.top_groups}) must be 1 to num_groups ({self.num_groups})",
            ),
            (
                not 1 <= self.top_k <= reachable,
                f"top_k ({self.top_k}) must be 1 to {reachable}, the experts of top_groups ({self.top_groups}) "
                f"of num_groups ({self.num_groups})",
            ),
            (
                self.num_groups > 1 and self.group_score == "top2_sum" and group_size < 2,
                f"group_score top2_sum needs groups of at least 2 experts, not {group_size}",
            ),
        ):
            if wrong:
                raise ConfigError(f"router: {message}; check the model's config")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpec:
    """One routed expert: `down(act(gate(x)) * up(x))`.

    Attributes:
        intermediate_size: inner width I.
        activation: "swiglu_clamped" is `(clamp(up, -limit, limit) + 1) * g * sigmoid(alpha * g)` with
            `g = min(gate, limit)`.
        bias: gate, up and down have one.
    """

    intermediate_size: int
    activation: ExpertActivation = "silu"
    bias: bool = False
    alpha: float = 1.702
    limit: float = 7.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSpec:
    """An expert every token visits; `gated` multiplies it by `sigmoid(gate(x))` (Qwen2-MoE)."""

    intermediate_size: int
    gated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacitySpec:
    """An opt-in limit of tokens per expert, counted per request; the default of a layer is dropless (no CapacitySpec).

    Attributes:
        factor: C; by default an expert takes at most `ceil(C * k * T / E)` of a request's T tokens of a step.
        min_capacity: at least so many.
        rule: the formula, see `capacity.capacities`; tutel and nllb give a factor <= 0 a meaning of its own.
        priority: who stays: the earlier token, the token with the larger best weight, or the larger weights per expert.
        overflow: the choice is dropped (its weight 0, the residual passes), or goes to the next best expert with room.

    Raises:
        ConfigError: a factor the rule does not know, or a negative min_capacity.
    """

    factor: float
    min_capacity: int = 1
    rule: CapacityRule = "gshard"
    priority: Priority = "fifo"
    overflow: Overflow = "drop"

    def __post_init__(self) -> None:
        if not math.isfinite(self.factor) or (self.factor <= 0 and self.rule in ("gshard", "vmoe")):
            raise ConfigError(
                f"capacity: factor ({self.factor}) must be a positive number under rule {self.rule}; "
                "use 1.0 or more, or leave the capacity out: the default drops nothing"
            )
        if self.factor < 0 and self.rule == "nllb":
            raise ConfigError(f"capacity: factor ({self.factor}) must be at least 0 under rule nllb; use 0 or more")
        if self.min_capacity < 0:
            raise ConfigError(f"capacity: min_capacity ({self.min_capacity}) must be at least 0; use 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """Task-level routing of a layer: a request names its task, and all its tokens visit that task's experts.

    Attributes:
        experts: of each task, `top_k` different logical experts.
        weights: of the experts, in the same shape; None = equal, 1 / top_k.
    """

    experts: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """The feed-forward block of a layer: routed experts, and optionally a shared one.

    Attributes:
        router: from a token to experts; of its fields only the numbers count where there are `tasks`.
        residual: a pyramid-residual layer: `c0 * routed + c1 * shared`, `c = softmax(coef(x))`; needs `shared`.
        tasks: there is no gate: experts by the request's task.
    """

    router: RouterSpec
    experts: ExpertSpec
    shared: SharedSpec | None = None
    residual: bool = False
    capacity: CapacitySpec | None = None
    tasks: TaskSpec | None = None
