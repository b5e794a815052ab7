"""Capacity limits: against a slow plain-Python model and NLLB of transformers; tenants never see each other. 7 s."""

import math
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

from phalanx.errors import ConfigError
from phalanx.moe.capacity import assign, capacities
from phalanx.moe.routers.topk import Routing, route
from phalanx.moe.spec import CapacitySpec, RouterSpec

SCOPE_IDS = torch.tensor([-(2**62), -1, 0, 7, 2**62])
SPECS = st.builds(
    CapacitySpec,
    factor=st.sampled_from([0.25, 0.5, 0.7, 1.0, 1.25, 4.0]),
    min_capacity=st.integers(0, 2),
    rule=st.sampled_from(["gshard", "vmoe", "tutel", "nllb"]),
    priority=st.sampled_from(["fifo", "bpr", "probs"]),
    overflow=st.sampled_from(["drop", "next"]),
)


class Batch(NamedTuple):
    scores_TE: Tensor
    routing: Routing
    scope_T: Tensor
    importance_T: Tensor

    def rows(self, rows: Tensor) -> "Batch":
        routing = Routing(*(column[rows] for column in self.routing))
        return Batch(self.scores_TE[rows], routing, self.scope_T[rows], self.importance_T[rows])


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Scores of few values, so that everything ties; some entries are -1 already, some rows hold NaN or infinity."""
    num_experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, min(3, num_experts)))
    tokens, scopes = draw(st.integers(0, 14)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scores_TE = torch.randint(1, 4, (tokens, num_experts), generator=generator) / 4
    routing = route(scores_TE, RouterSpec(num_experts=num_experts, top_k=top_k, score="none"))
    gone_TK = torch.rand((tokens, top_k), generator=generator) < 0.1
    routing = Routing(routing[0].masked_fill(gone_TK, -1), routing[1].masked_fill(gone_TK, 0.0))
    scope_T = SCOPE_IDS[torch.randint(0, scopes, (tokens,), generator=generator)]
    importance_T = torch.randint(1, 4, (tokens,), generator=generator) / 4
    return Batch(scores_TE, routing, scope_T, importance_T)


def run(batch: Batch, spec: CapacitySpec, **importance: Tensor) -> tuple[Routing, Tensor]:
    num_experts = batch.scores_TE.shape[1]
    return assign(batch.routing, spec, batch.scope_T, num_experts, scores_TE=batch.scores_TE, **importance)


def limit(spec: CapacitySpec, tokens: int, needed: int, num_experts: int, top_k: int) -> int:
    c, share = spec.factor, math.ceil(tokens / num_experts)
    value = {
        "gshard": math.ceil(c * top_k * tokens / num_experts),
        "vmoe": round(c * top_k * tokens / num_experts),
        "tutel": needed if c == 0 else top_k * int(abs(c) * share),
        "nllb": math.ceil(c * tokens) if c > 0 else top_k * share,
    }[spec.rule]
    if spec.rule == "tutel" and c < 0:
        value = min(value, needed)
    return max(value, spec.min_capacity)


def oracle(batch: Batch, spec: CapacitySpec, importance: list[float] | None) -> tuple[list[list[int]], int]:
    """One entry after the other, one scope after the other: the new ids, and how many were dropped."""
    num_experts = batch.scores_TE.shape[1]
    ids, weights = (column.tolist() for column in batch.routing)
    scores, out = batch.scores_TE.tolist(), [list(row) for row in ids]
    importance = [max(row) for row in weights] if importance is None else importance
    top_k = len(batch.routing.topk_ids_TK[0]) if ids else 0

    def turn(entry: tuple[int, int]) -> tuple[float, ...]:
        token, choice = entry
        return {
            "fifo": (choice, token),
            "bpr": (choice, -importance[token], token),
            "probs": (-weights[token][choice], choice, token),
        }[spec.priority]

    dropped = 0
    for scope in set(batch.scope_T.tolist()):
        tokens = [t for t, s in enumerate(batch.scope_T.tolist()) if s == scope]
        entries = sorted(((t, k) for t in tokens for k in range(top_k) if ids[t][k] >= 0), key=turn)
        load = Counter(ids[t][k] for t, k in entries)
        capacity = limit(spec, len(tokens), max(load.values(), default=0), num_experts, top_k)
        used: Counter[int] = Counter()
        lost = []
        for t, k in entries:
            if used[ids[t][k]] < capacity:
                used[ids[t][k]] += 1
            else:
                out[t][k] = -1
                lost.append((t, k))
        if spec.overflow == "drop":
            dropped += len(lost)
            continue
        for choice in range(top_k):
            asking = [entry for entry in lost if entry[1] == choice]  # in the order of service
            while asking:
                room = {e: capacity - used[e] for e in range(num_experts) if used[e] < capacity}
                wishes = {}
                for t, _ in asking:
                    offers = [e for e in room if e not in out[t]]
                    if offers:
                        wishes[t] = max(offers, key=lambda e: (scores[t][e], -e))
                dropped += len(asking) - len(wishes)
                asking = [entry for entry in asking if entry[0] in wishes]
                refused = []
                for t, k in asking:
                    if used[wishes[t]] < capacity:
                        used[wishes[t]] += 1
                        out[t][k] = wishes[t]
                    else:
                        refused.append((t, k))
                asking = refused
    return out, dropped


@settings(max_examples=400, deadline=None, derandomize=True)
@given(batches(), SPECS, st.booleans())
def test_equals_the_slow_model(batch: Batch, spec: CapacitySpec, own_importance: bool) -> None:
    importance = {"importance_T": batch.importance_T} if own_importance else {}
    before = [column.clone() for column in batch.routing]
    (ids_TK, weights_TK), dropped = run(batch, spec, **importance)
    expected_ids, expected_dropped = oracle(batch, spec, batch.importance_T.tolist() if own_importance else None)
    assert ids_TK.tolist() == expected_ids
    assert ids_TK.dtype == torch.int32
    assert int(dropped) == expected_dropped
    assert torch.equal(weights_TK, torch.where(ids_TK < 0, 0.0, batch.routing.topk_weights_TK))
    assert all(torch.equal(now, then) for now, then in zip(batch.routing, before, strict=True))  # inputs stay


@settings(max_examples=200, deadline=None, derandomize=True)
@given(batches(), SPECS, st.booleans())
def test_a_tenant_never_sees_another(batch: Batch, spec: CapacitySpec, own_importance: bool) -> None:
    """The rows of one scope alone give the bits they have in any batch."""
    (ids_TK, weights_TK), dropped = run(batch, spec, **({"importance_T": batch.importance_T} if own_importance else {}))
    total = 0
    for scope in batch.scope_T.unique():
        rows = (batch.scope_T == scope).nonzero().squeeze(1)
        alone = batch.rows(rows)
        importance = {"importance_T": alone.importance_T} if own_importance else {}
        (alone_ids_TK, alone_weights_TK), alone_dropped = run(alone, spec, **importance)
        assert torch.equal(alone_ids_TK, ids_TK[rows])
        assert torch.equal(alone_weights_TK, weights_TK[rows])
        total += int(alone_dropped)
    assert total == int(dropped)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(batches(), SPECS)
def test_no_expert_of_a_scope_is_over_its_limit(batch: Batch, spec: CapacitySpec) -> None:
    (ids_TK, _), _ = run(batch, spec)
    num_experts = batch.scores_TE.shape[1]
    for scope in batch.scope_T.unique():
        rows = batch.scope_T == scope
        needed = max(
            Counter(i for i in batch.routing.topk_ids_TK[rows].view(-1).tolist() if i >= 0).values(), default=0
        )
        capacity = limit(spec, int(rows.sum()), needed, num_experts, ids_TK.shape[1])
        assert max(Counter(i for i in ids_TK[rows].view(-1).tolist() if i >= 0).values(), default=0) <= capacity
    for row in ids_TK.tolist():
        chosen = [i for i in row if i >= 0]
        assert len(chosen) == len(set(chosen))


@pytest.mark.parametrize("batch_priority", [False, True], ids=["fifo", "bpr"])
@pytest.mark.parametrize("fraction", [-1.0, 0.05, 0.1, 0.4])
@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_equals_nllb_of_transformers(tokens: int, fraction: float, batch_priority: bool) -> None:
    """A fresh router per case, because it keeps the capacity of its first call; no ties, its argsort is not stable."""
    num_experts = 8
    config = NllbMoeConfig(
        num_experts=num_experts,
        hidden_size=8,
        batch_prioritized_routing=batch_priority,
        moe_eval_capacity_token_fraction=fraction,
        normalize_router_prob_before_dropping=True,
        second_expert_policy="all",
    )
    logits_TE = torch.randn((tokens, num_experts), generator=torch.Generator().manual_seed(11)) * 2
    router = NllbMoeTop2Router(config).eval()
    router.expert_capacity = None  # then 2 ceil(T / E) without a fraction
    _, expected_TE = router.route_tokens(logits_TE.clone())

    eps = torch.finfo(torch.float32).eps
    rule = RouterSpec(num_experts=num_experts, top_k=2, normalise="max_sum", min_sum=eps)
    spec = CapacitySpec(factor=max(fraction, 0.0), rule="nllb", priority="bpr" if batch_priority else "fifo")
    (ids_TK, weights_TK), dropped = assign(
        route(logits_TE, rule),
        spec,
        torch.zeros(tokens, dtype=torch.int64),
        num_experts,
        importance_T=logits_TE.softmax(dim=-1).amax(dim=-1),
    )
    weights_TE = torch.zeros((tokens, num_experts + 1)).scatter_(1, ids_TK.long() % (num_experts + 1), weights_TK)
    torch.testing.assert_close(weights_TE[:, :num_experts], expected_TE, atol=1e-7, rtol=1e-6)
    assert int(dropped) == 2 * tokens - int((expected_TE > 0).sum())
    if (tokens, fraction) == (50, 0.1):
        assert int(dropped) > 10  # the case limits


# T = 10 and 0 tokens, E 4, k 2; needed 7 and 0.
@pytest.mark.parametrize(
    ("rule", "factor", "minimum", "expected"),
    [
        ("gshard", 1.0, 1, [5, 1]),
        ("gshard", 1.1, 1, [6, 1]),
        ("gshard", 0.1, 4, [4, 4]),
        ("vmoe", 1.1, 0, [6, 0]),
        ("vmoe", 0.9, 0, [4, 0]),  # 4.5, halves to even
        ("tutel", 1.0, 0, [6, 0]),
        ("tutel", 1.5, 0, [8, 0]),
        ("tutel", 0.0, 0, [7, 0]),
        ("tutel", -1.0, 0, [6, 0]),
        ("tutel", -2.0, 0, [7, 0]),
        ("nllb", 0.25, 0, [3, 0]),
        ("nllb", 0.0, 0, [6, 0]),
    ],
)
def test_capacity_rules(rule: Any, factor: float, minimum: int, expected: list[int]) -> None:
    spec = CapacitySpec(factor=factor, min_capacity=minimum, rule=rule)
    limits = capacities(spec, torch.tensor([10, 0]), torch.tensor([7, 0]), num_experts=4, top_k=2)
    assert limits.tolist() == expected
    assert limits.tolist() == [limit(spec, tokens, needed, 4, 2) for tokens, needed in ((10, 7), (0, 0))]


def test_priorities_by_hand() -> None:
    """Three tokens want expert 0 and it takes one: the first, the most important, or the largest weight."""
    routing = Routing(
        torch.tensor([[1, 0], [0, 2], [0, 1]], dtype=torch.int32),
        torch.tensor([[0.9, 0.8], [0.5, 0.1], [0.6, 0.3]]),
    )
    scope_T = torch.zeros(3, dtype=torch.int64)
    kept = {}
    for priority in ("fifo", "bpr", "probs"):
        spec = CapacitySpec(factor=0.1, priority=priority)
        kept[priority] = assign(routing, spec, scope_T, 3)[0].topk_ids_TK.tolist()
    assert kept["fifo"] == [[1, -1], [0, 2], [-1, -1]]  # first choices go before token 0's second
    assert kept["bpr"] == [[1, -1], [-1, 2], [0, -1]]
    assert kept["probs"] == [[1, 0], [-1, 2], [-1, -1]]


def test_next_best_by_hand() -> None:
    """All four want expert 2; it takes one, then 0 takes the best of those who ask, then 1; the last finds no room."""
    routing = Routing(torch.full((4, 1), 2, dtype=torch.int32), torch.ones((4, 1)))
    scores_TE = torch.tensor([[0.2, 0.1, 0.7], [0.2, 0.1, 0.7], [float("-inf"), float("nan"), 0.7], [0.3, 0.1, 0.6]])
    spec = CapacitySpec(factor=0.1, overflow="next")
    (ids_TK, weights_TK), dropped = assign(routing, spec, torch.zeros(4, dtype=torch.int64), 3, scores_TE=scores_TE)
    assert ids_TK.tolist() == [[2], [0], [1], [-1]]
    assert weights_TK.tolist() == [[1.0], [1.0], [1.0], [0.0]]
    assert int(dropped) == 1


def test_dropless_when_there_is_room() -> None:
    spec = RouterSpec(num_experts=8, top_k=2, normalise="sum")
    routing = route(torch.randn((100, 8), generator=torch.Generator().manual_seed(1)), spec)
    kept, dropped = assign(routing, CapacitySpec(factor=4.0), torch.arange(100) % 3, 8)
    assert int(dropped) == 0
    assert all(torch.equal(now, then) for now, then in zip(kept, routing, strict=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"factor": 0.0}, r"factor \(0.0\).*gshard"),
        ({"factor": -1.0, "rule": "vmoe"}, r"factor \(-1.0\).*vmoe"),
        ({"factor": -1.0, "rule": "nllb"}, r"factor \(-1.0\).*nllb"),
        ({"factor": float("nan"), "rule": "tutel"}, r"factor \(nan\)"),
        ({"factor": 1.0, "min_capacity": -1}, r"min_capacity \(-1\)"),
    ],
)
def test_impossible_limits_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CapacitySpec(**values)


def test_overflow_next_needs_scores() -> None:
    routing = Routing(torch.zeros((1, 1), dtype=torch.int32), torch.ones((1, 1)))
    with pytest.raises(ConfigError, match="scores_TE"):
        assign(routing, CapacitySpec(factor=1.0, overflow="next"), torch.zeros(1, dtype=torch.int64), 2)
