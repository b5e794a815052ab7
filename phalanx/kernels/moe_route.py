"""Choose the experts of every token: score, group limit, top-k and weights of a mixture-of-experts router in one op.

Shapes: T tokens, E experts, G groups of M experts, K experts per token.
"""
# ruff: noqa: D102 - the fields of `Rule` are documented where they are data, in `moe.spec.RouterSpec`

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.kernels.op import Cost, Op

SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "none")
GROUP_SCORES = ("max", "top2_sum")
NORMALISATIONS = ("none", "sum", "max_sum", "softmax")


class Rule(Protocol):
    """What the op must know of a router; `moe.spec.RouterSpec` has these fields, documents and checks them."""

    @property
    def top_k(self) -> int: ...
    @property
    def score(self) -> str: ...
    @property
    def num_groups(self) -> int: ...
    @property
    def top_groups(self) -> int: ...
    @property
    def group_score(self) -> str: ...
    @property
    def group_mask(self) -> float: ...
    @property
    def normalise(self) -> str: ...
    @property
    def eps(self) -> float: ...
    @property
    def min_sum(self) -> float: ...
    @property
    def scale(self) -> float: ...


def reference(router_logits: Tensor, correction_bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """The `top_k` experts of every row, best first, equal scores by lower id; a row depends on nothing but itself.

    The bias takes part in the selection and never in the weights. A row with NaN gets distinct valid ids and whatever
    weights come out.

    Args:
        router_logits: (T, E), contiguous.
        correction_bias: (E) fp32, contiguous, or None.
        rule: of the router.

    Returns:
        Ids (T, K) int32, and weights (T, K) in the dtype of the logits; maths in fp32.
    """
    scores_TE = _scores(router_logits.float(), rule.score)
    selection_TE = scores_TE if correction_bias is None else scores_TE + correction_bias
    if rule.num_groups > 1:
        selection_TE = _mask_groups(selection_TE, rule)
    ids_TK = _best(selection_TE, rule.top_k)
    # Without a bias the masked scores are right: a masked expert, which a row may reach when all others underflowed
    # to 0.0, weighs nothing.
    weights_TK = (selection_TE if correction_bias is None else scores_TE).gather(-1, ids_TK)
    weights_TK = _normalised(weights_TK, rule) * rule.scale
    return ids_TK.int(), weights_TK.to(router_logits.dtype)


def _scores(logits_TE: Tensor, score: str) -> Tensor:
    if score == "softmax":
        return logits_TE.softmax(dim=-1)
    if score == "sigmoid":
        return logits_TE.sigmoid()
    if score == "sqrtsoftplus":
        return F.softplus(logits_TE).sqrt()
    return logits_TE


def _mask_groups(selection_TE: Tensor, rule: Rule) -> Tensor:
    """Keep the experts of the best `top_groups` groups."""
    tokens, experts = selection_TE.shape
    selection_TGM = selection_TE.view(tokens, rule.num_groups, experts // rule.num_groups)
    if rule.group_score == "max":
        group_scores_TG = selection_TGM.amax(dim=-1)
    else:
        group_scores_TG = selection_TGM.topk(2, dim=-1).values.sum(dim=-1)
    masked_TG = torch.ones_like(group_scores_TG, dtype=torch.bool)
    masked_TG.scatter_(1, _best(group_scores_TG, rule.top_groups), False)
    return selection_TGM.masked_fill(masked_TG.unsqueeze(-1), rule.group_mask).view(tokens, experts)


def _best(scores: Tensor, count: int) -> Tensor:
    """int64 columns of the `count` largest entries of every row, best first, equal ones by lower column.

    `torch.topk` promises nothing about ties, so it sees integer keys that have none: the fp32 bits, which sort as
    signed integers once the magnitude bits of negative numbers are flipped, above the column.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.long() << 32) - torch.arange(scores.shape[-1], device=scores.device)
    return keys.topk(count, dim=-1).indices


def _normalised(weights_TK: Tensor, rule: Rule) -> Tensor:
    if rule.normalise == "softmax":
        return weights_TK.softmax(dim=-1)
    if rule.normalise == "sum":
        return weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + rule.eps)
    if rule.normalise == "max_sum":
        return weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=rule.min_sum)
    return weights_TK


class Problem(NamedTuple):
    """Static facts of a call, and its `Rule`."""

    tokens: int
    num_experts: int
    top_k: int
    score: str = "softmax"
    use_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    group_mask: float = float("-inf")
    normalise: str = "sum"
    eps: float = 0.0
    min_sum: float = 0.0
    scale: float = 1.0


def make_inputs(problem: Problem, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """Random logits and biases of few values, so that ties happen.

    Not symmetric around 0: sigmoid(x) + sigmoid(-x) = 1 for every x, and which of such sums is larger is rounding.
    """
    shape = (problem.tokens, problem.num_experts)
    logits = (torch.randn(shape, generator=generator) * 16).round() / 8 + 0.03
    bias = (torch.randn(problem.num_experts, generator=generator) * 2).round() / 8 - 0.4
    return {
        "router_logits": logits.to(dtype),
        "correction_bias": bias if problem.use_bias else None,
        "rule": problem,
    }


def cost(problem: Problem, dtype: torch.dtype) -> Cost:
    """Every logit once, the choices out; an exponential per logit and a comparison per logit and choice."""
    logits, choices = problem.tokens * problem.num_experts, problem.tokens * problem.top_k
    return Cost(logits * dtype.itemsize + choices * (4 + dtype.itemsize), logits * (20 + problem.top_k))


SIGMOID = Problem(70, 128, 8, "sigmoid", use_bias=True, eps=1e-20, scale=2.5)
GROUPED = SIGMOID._replace(num_experts=256, num_groups=8, top_groups=4, group_score="top2_sum")
OP = Op(
    name="moe_route",
    reference=reference,
    make_inputs=make_inputs,
    cost=cost,
    problems={
        "test": (
            Problem(0, 8, 2),
            Problem(1, 8, 8),
            Problem(300, 33, 1, normalise="none"),
            Problem(70, 60, 4, "none", normalise="softmax"),
            Problem(70, 48, 5, "sqrtsoftplus", use_bias=True, normalise="max_sum", min_sum=6.0),
            Problem(70, 64, 6, num_groups=4, top_groups=2, group_mask=0.0, normalise="none", scale=16.0),
            SIGMOID,
            GROUPED,
        ),
        "bench": (
            Problem(1, 32, 4),
            Problem(32, 32, 4),
            Problem(32, 128, 8),
            GROUPED._replace(tokens=32),
            Problem(4096, 128, 8),
        ),
    },
)
