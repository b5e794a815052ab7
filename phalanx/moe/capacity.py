"""Capacity limits of experts, opt-in: which choices stay, which are dropped or go elsewhere.

Everything is counted per scope, one request: a limit across requests would make a user's output depend on who else is
in the batch, and even leak it (arXiv:2410.22884, arXiv:2402.05526).

Shapes: T tokens, E experts, K choices per token, S scopes, N = K * T entries, all first choices before all second ones.
"""

import torch
from torch import Tensor

from phalanx.errors import ConfigError
from phalanx.moe.routers.topk import Routing
from phalanx.moe.spec import CapacitySpec


def assign(
    routing: Routing,
    spec: CapacitySpec,
    scope_T: Tensor,
    num_experts: int,
    *,
    importance_T: Tensor | None = None,
    scores_TE: Tensor | None = None,
) -> tuple[Routing, Tensor]:
    """Limit the tokens per expert and scope.

    Entries are served by `spec.priority`: "fifo" and "bpr" (batch priority) serve all first choices before all second
    ones, each in the order of the tokens or of falling importance; "probs" serves by falling weight alone. Ties go to
    the earlier choice, then to the earlier token. An entry that finds its expert full is dropped (id -1, weight 0;
    other weights stay as they are), or with overflow "next" it is dropped only if every expert is full or the token's
    already: overflowed first choices move before second ones, in rounds in which every token asks for its best expert
    with room; a moved choice keeps its weight.

    Args:
        routing: of the router; entries with id -1 take no room.
        spec: the limit.
        scope_T: (T) int64, equal for tokens of one request.
        num_experts: E.
        importance_T: (T) of tokens for "bpr"; default: their largest weight.
        scores_TE: (T, E) scores or logits of the router, for overflow "next".

    Returns:
        The new routing, and how many choices were dropped, () int64.

    Raises:
        ConfigError: overflow "next" without scores.

    Cost: one sort of T * K keys, one per round of overflow; a host synchronisation for the number of scopes.
    Source: GShard (arXiv:2006.16668), V-MoE (arXiv:2106.05974) sec. 3 for batch priority.
    """
    if spec.overflow == "next" and scores_TE is None:
        raise ConfigError("capacity: overflow 'next' needs the router's scores; pass scores_TE or use overflow 'drop'")
    tokens, top_k = routing.topk_ids_TK.shape
    _, scope_T, tokens_S = scope_T.unique(return_inverse=True, return_counts=True)
    ids_N = routing.topk_ids_TK.T.reshape(-1).long()
    group_N = (scope_T * num_experts).repeat(top_k) + ids_N
    group_N = torch.where(ids_N < 0, len(tokens_S) * num_experts, group_N)  # entries without an expert share one
    load_SE = group_N.bincount(minlength=len(tokens_S) * num_experts + 1)[:-1].view(-1, num_experts)
    limit_S = capacities(spec, tokens_S, load_SE.amax(dim=1), num_experts, top_k)

    rank_N = _ranks(routing, spec, importance_T)
    full_N = _positions(group_N, rank_N) >= limit_S[scope_T].repeat(top_k)
    lost_TK = (full_N & (ids_N >= 0)).view(top_k, tokens).T
    ids_TK = routing.topk_ids_TK.masked_fill(lost_TK, -1)
    if spec.overflow == "next" and scores_TE is not None:
        room_SE = (limit_S[:, None] - load_SE).clamp(min=0)
        lost_TK = _move(ids_TK, lost_TK, scores_TE, scope_T, room_SE, rank_N.view(top_k, tokens))
    weights_TK = routing.topk_weights_TK.masked_fill(lost_TK, 0.0)
    return Routing(ids_TK, weights_TK), lost_TK.sum()


def capacities(spec: CapacitySpec, tokens_S: Tensor, needed_S: Tensor, num_experts: int, top_k: int) -> Tensor:
    """How many of a scope's tokens one expert takes, by `spec.rule`, never below `spec.min_capacity`.

    With T tokens of the scope, C = `spec.factor`:

    - gshard (also DeepSpeed): ceil(C k T / E)
    - vmoe: C k T / E, rounded to the nearest, halves to even
    - tutel: k floor(C ceil(T / E)); C = 0: what is needed; C < 0: what is needed, at most the value for -C
    - nllb: ceil(C T); C = 0: k ceil(T / E)

    Args:
        spec: the rule.
        tokens_S: (S) int64 tokens of each scope.
        needed_S: (S) int64, the most tokens that one expert would get.
        num_experts: E.
        top_k: k.

    Returns:
        (S) int64.

    Source: GShard (arXiv:2006.16668), V-MoE (arXiv:2106.05974), Tutel (arXiv:2206.03382), NLLB-MoE of transformers.
    """
    factor, ceiling_S = spec.factor, -(-tokens_S // num_experts)
    if spec.rule == "gshard":
        limit_S = (factor * top_k * tokens_S.double() / num_experts).ceil().long()
    elif spec.rule == "vmoe":
        limit_S = (factor * top_k * tokens_S.double() / num_experts).round().long()
    elif spec.rule == "tutel":
        limit_S = top_k * (abs(factor) * ceiling_S.double()).floor().long()
        if factor <= 0:
            limit_S = torch.minimum(needed_S, limit_S) if factor < 0 else needed_S
    else:
        limit_S = (factor * tokens_S.double()).ceil().long() if factor > 0 else top_k * ceiling_S
    return limit_S.clamp(min=spec.min_capacity)


def _ranks(routing: Routing, spec: CapacitySpec, importance_T: Tensor | None) -> Tensor:
    """(N) distinct numbers below N: entries with smaller ones are served first."""
    weights_TK = routing.topk_weights_TK
    (tokens, top_k), device = weights_TK.shape, weights_TK.device
    if spec.priority == "probs":
        return _inverse(weights_TK.T.reshape(-1).argsort(descending=True, stable=True))
    if spec.priority == "fifo":
        return torch.arange(tokens * top_k, device=device)
    importance_T = weights_TK.amax(dim=1) if importance_T is None else importance_T
    rank_T = _inverse(importance_T.argsort(descending=True, stable=True))
    return (rank_T + tokens * torch.arange(top_k, device=device)[:, None]).view(-1)


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _positions(group: Tensor, rank: Tensor) -> Tensor:
    """How many entries of the same group have a smaller rank."""
    bound = rank.max() + 1 if len(rank) else 1
    order = (group * bound + rank).argsort()
    sorted_group = group[order]
    first = torch.searchsorted(sorted_group, sorted_group)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device) - first)


def _move(
    ids_TK: Tensor, lost_TK: Tensor, scores_TE: Tensor, scope_T: Tensor, room_SE: Tensor, rank_KT: Tensor
) -> Tensor:
    """Give lost choices the next best experts; changes `ids_TK` and `room_SE`, returns what stays lost.

    A round ends with each asker placed, or its expert full: no token asks twice for one expert.
    """
    lost_TK = lost_TK.clone()
    open_TE = torch.ones_like(scores_TE, dtype=torch.bool)
    rows, columns = (ids_TK >= 0).nonzero(as_tuple=True)
    open_TE[rows, ids_TK[rows, columns].long()] = False
    lowest = torch.finfo(scores_TE.dtype).min
    scores_TE = scores_TE.nan_to_num(nan=lowest, neginf=lowest)  # above the -inf of experts that are not offered
    for choice in range(ids_TK.shape[1]):
        asking = lost_TK[:, choice].nonzero().squeeze(1)
        while len(asking):
            offered_TE = open_TE[asking] & (room_SE[scope_T[asking]] > 0)
            has_offer = offered_TE.any(dim=1)
            asking, offered_TE = asking[has_offer], offered_TE[has_offer]
            expert = scores_TE[asking].masked_fill(~offered_TE, float("-inf")).argmax(dim=1)
            group = scope_T[asking] * room_SE.shape[1] + expert
            placed = _positions(group, rank_KT[choice, asking]) < room_SE[scope_T[asking], expert]
            winners, experts = asking[placed], expert[placed]
            ids_TK[winners, choice] = experts.int()
            lost_TK[winners, choice] = False
            open_TE[winners, experts] = False
            room_SE.view(-1).sub_(group[placed].bincount(minlength=room_SE.numel()))
            asking = asking[~placed]
    return lost_TK
