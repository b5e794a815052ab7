"""`route` with every op against the routers of transformers, per family, and its own promises. About 7 s."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.afmoe import modeling_afmoe
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe
from transformers.models.glm4_moe import modeling_glm4_moe
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.lfm2_moe import modeling_lfm2_moe
from transformers.models.minimax_m2 import modeling_minimax_m2
from transformers.models.mixtral import modeling_mixtral
from transformers.models.olmoe import modeling_olmoe
from transformers.models.qwen2_moe import modeling_qwen2_moe
from transformers.models.qwen3_moe import modeling_qwen3_moe

from phalanx import plugins
from phalanx.errors import ConfigError
from phalanx.kernels import moe_route, registry
from phalanx.kernels.op import Function, Impl
from phalanx.moe.routers.topk import route
from phalanx.moe.spec import MoeSpec, RouterSpec

OPS = registry.implementations(moe_route.OP, torch.device("cpu"))

Hf = Mapping[str, Any]
"""A Hugging Face config as a dict."""


@pytest.fixture(params=OPS, ids=[impl.name for impl in OPS])
def op(request: pytest.FixtureRequest) -> Function:
    impl: Impl = request.param
    if (reason := impl.supports(torch.float32)) is not None:
        pytest.skip(reason)
    return impl.load(torch.float32)


def served(hf: Hf) -> RouterSpec:
    """What the family's own file makes of the config."""
    family = plugins.load("models", hf["model_type"], ("decoder_config", "TINY"))
    layers = family.decoder_config({**family.TINY, **hf}).layers
    return next(layer.mlp.router for layer in layers if isinstance(layer.mlp, MoeSpec))


def ernie4_5_moe(hf: Hf) -> RouterSpec:
    return RouterSpec(
        num_experts=hf["moe_num_experts"],
        top_k=hf["moe_k"],
        use_bias=True,
        normalise="max_sum",
        min_sum=hf["moe_norm_min"],
        gate_dtype="float32",
        weights_in_model_dtype=True,
    )


def minimax_m2(hf: Hf) -> RouterSpec:
    return RouterSpec(
        num_experts=hf["num_local_experts"],
        top_k=hf["num_experts_per_tok"],
        score="sigmoid",
        use_bias=True,
        normalise="sum",
    )


def lfm2_moe(hf: Hf) -> RouterSpec:
    """fp32 only: transformers computes the scores in the model's dtype."""
    return RouterSpec(
        num_experts=hf["num_experts"],
        top_k=hf["num_experts_per_tok"],
        score="sigmoid",
        use_bias=hf.get("use_expert_bias", True),
        normalise="sum" if hf.get("norm_topk_prob", True) else "none",
        eps=1e-6,
        scale=hf.get("routed_scaling_factor", 1.0),
        weights_in_model_dtype=True,
    )


def afmoe(hf: Hf) -> RouterSpec:
    return RouterSpec(
        num_experts=hf["num_experts"],
        top_k=hf["num_experts_per_tok"],
        score="sigmoid",
        use_bias=True,
        normalise="sum",
        eps=1e-20,
        scale=hf["route_scale"],
    )


SPECS: dict[str, Callable[[Hf], RouterSpec]] = {
    "mixtral": served,
    "qwen2_moe": served,
    "qwen3_moe": served,
    "olmoe": served,
    "deepseek_v2": served,
    "deepseek_v3": served,
    "glm4_moe": served,
    "gpt_oss": served,
    # No family file yet: what one would say.
    "ernie4_5_moe": ernie4_5_moe,
    "minimax_m2": minimax_m2,
    "lfm2_moe": lfm2_moe,
    "afmoe": afmoe,
}
"""Family -> the rule, from the Hugging Face config."""

HF_ROUTERS: dict[str, Callable[[Any], torch.nn.Module]] = {
    "mixtral": modeling_mixtral.MixtralTopKRouter,
    "qwen2_moe": modeling_qwen2_moe.Qwen2MoeTopKRouter,
    "qwen3_moe": modeling_qwen3_moe.Qwen3MoeTopKRouter,
    "olmoe": modeling_olmoe.OlmoeTopKRouter,
    "deepseek_v2": modeling_deepseek_v2.DeepseekV2TopkRouter,
    "deepseek_v3": modeling_deepseek_v3.DeepseekV3TopkRouter,
    "glm4_moe": modeling_glm4_moe.Glm4MoeTopkRouter,
    "gpt_oss": modeling_gpt_oss.GptOssTopKRouter,
    "ernie4_5_moe": modeling_ernie4_5_moe.Ernie4_5_MoeTopKRouter,
    "minimax_m2": modeling_minimax_m2.MiniMaxM2TopKRouter,
    "lfm2_moe": modeling_lfm2_moe.Lfm2MoeTopKRouter,
    "afmoe": modeling_afmoe.AfmoeTokenChoiceRouter,
}
BIAS_IS_ARGUMENT = ("minimax_m2", "lfm2_moe", "afmoe")
TOKENS, EXPERTS = 64, 16
GROUPS = {"n_group": 4, "topk_group": 2}
SIGMOID = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 4, "routed_scaling_factor": 2.5}
GREEDY = {**SIGMOID, "topk_method": "greedy"}


class Case(NamedTuple):
    family: str
    config: dict[str, Any]


CASES = [
    Case("mixtral", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    *(
        Case(family, {"num_experts": EXPERTS, "num_experts_per_tok": 4, "norm_topk_prob": norm})
        for family in ("qwen2_moe", "qwen3_moe", "olmoe")
        for norm in (False, True)
    ),
    Case("deepseek_v2", GREEDY),
    Case("deepseek_v2", {**GREEDY, **GROUPS, "topk_method": "group_limited_greedy"}),
    Case("deepseek_v3", {**SIGMOID, **GROUPS}),
    Case("deepseek_v3", {**SIGMOID, **GROUPS, "norm_topk_prob": False}),
    Case("glm4_moe", SIGMOID),
    Case("glm4_moe", {**SIGMOID, **GROUPS}),
    Case("gpt_oss", {"num_local_experts": EXPERTS, "num_experts_per_tok": 4}),
    Case("ernie4_5_moe", {"moe_num_experts": EXPERTS, "moe_k": 4, "moe_norm_min": 0.3}),
    Case("minimax_m2", {"num_local_experts": EXPERTS, "num_experts_per_tok": 4}),
    Case("lfm2_moe", {"num_experts": EXPERTS, "num_experts_per_tok": 4}),
    Case("lfm2_moe", {"num_experts": EXPERTS, "num_experts_per_tok": 4, "use_expert_bias": False}),
    Case("afmoe", {"num_experts": EXPERTS, "num_experts_per_tok": 4, "route_scale": 1.7}),
]


def dense(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """(T, E) weights: transformers promises no order of the k experts."""
    weights_TE = torch.zeros((len(ids_TK), EXPERTS))
    return weights_TE.scatter_(1, ids_TK.long(), weights_TK.float())


def hf_route(case: Case, logits_TE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and weights of the transformers router. Its gate is the identity, so it sees exactly these logits."""
    config = AutoConfig.for_model(case.family, hidden_size=EXPERTS, num_attention_heads=1, **case.config)
    router = HF_ROUTERS[case.family](config).to(logits_TE.dtype).eval()
    gate = router.gate if case.family == "afmoe" else router
    gate.weight.data = torch.eye(EXPERTS, dtype=gate.weight.dtype)
    if case.family == "gpt_oss":
        router.bias.data.zero_()
    elif case.family == "ernie4_5_moe":
        router.moe_statics.e_score_correction_bias.data = bias_E[None]
    elif hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias = bias_E
    x_TD = logits_TE[None] if case.family == "afmoe" else logits_TE
    with torch.no_grad():
        _, weights_TK, ids_TK = router(x_TD, bias_E) if case.family in BIAS_IS_ARGUMENT else router(x_TD)
    return ids_TK, weights_TK


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case.family}-{i}-{dtype}")
        for i, case in enumerate(CASES)
        for dtype in (torch.float32, torch.bfloat16)
        if (case.family, dtype) != ("lfm2_moe", torch.bfloat16)  # its scores are bf16, so that ties decide
    ],
)
def test_equals_transformers(case: Case, dtype: torch.dtype, op: Function) -> None:
    generator = torch.Generator().manual_seed(7)
    # A row is a permutation of distinct bf16 numbers, because transformers promises nothing about ties.
    order_TE = torch.rand((TOKENS, EXPERTS), generator=generator).argsort(dim=-1)
    logits_TE = (torch.linspace(-3, 3, EXPERTS) + 0.01)[order_TE].to(dtype)
    # Redrawn, since transformers starts it at 0; as large as the scores, and negative often: the group mask shows.
    bias_E = torch.randn(EXPERTS, generator=generator) * 0.5 - 0.3
    spec = SPECS[case.family]({"model_type": case.family, **case.config})
    routing = route(logits_TE, spec, correction_bias_E=bias_E if spec.use_bias else None, model_dtype=dtype, op=op)
    assert routing.topk_ids_TK.dtype == torch.int32
    assert routing.topk_weights_TK.dtype == torch.float32
    hf_ids_TK, hf_weights_TK = hf_route(case, logits_TE, bias_E)
    if dtype == torch.bfloat16:
        assert spec.weights_in_model_dtype == (hf_weights_TK.dtype == torch.bfloat16)
    assert torch.equal(routing.topk_weights_TK, routing.topk_weights_TK.to(hf_weights_TK.dtype).float())
    # bf16: both round the same fp32 number once, up to the order of its sum.
    tolerance = {"atol": 1e-7, "rtol": 2e-6 if hf_weights_TK.dtype == torch.float32 else 2**-7}
    torch.testing.assert_close(dense(*routing), dense(hf_ids_TK, hf_weights_TK), **tolerance)


def oracle(logits: list[float], bias: list[float], spec: RouterSpec) -> tuple[list[int], list[float]]:
    """Steps 1 to 7 of one row, in fp64 and plain Python; sorting by (-score, id) is the tie rule."""
    x = torch.tensor(logits, dtype=torch.float64)
    scores = {
        "softmax": x.softmax(0),
        "sigmoid": x.sigmoid(),
        "sqrtsoftplus": (1 + x.exp()).log().sqrt(),
        "none": x,
    }[spec.score].tolist()
    selection = [s + b for s, b in zip(scores, bias, strict=True)] if spec.use_bias else list(scores)
    size = spec.num_experts // spec.num_groups
    groups = [sorted(selection[g * size : (g + 1) * size])[::-1] for g in range(spec.num_groups)]
    value = [g[0] if spec.group_score == "max" else sum(g[:2]) for g in groups]
    kept = sorted(range(spec.num_groups), key=lambda g: (-value[g], g))[: spec.top_groups]
    selection = [s if e // size in kept else spec.group_mask for e, s in enumerate(selection)]
    ids = sorted(range(spec.num_experts), key=lambda e: (-selection[e], e))[: spec.top_k]
    weights = torch.tensor([scores[e] if spec.use_bias else selection[e] for e in ids], dtype=torch.float64)
    if spec.normalise == "softmax":
        weights = weights.softmax(0)
    elif spec.normalise == "sum":
        weights = weights / (weights.sum() + spec.eps)
    elif spec.normalise == "max_sum":
        weights = weights / max(weights.sum().item(), spec.min_sum)
    return ids, (weights * spec.scale).tolist()


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus", "none"])
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("groups", [(1, 1, "max"), (4, 2, "max"), (4, 3, "top2_sum")])
def test_ties_go_to_the_lower_id(score: Any, use_bias: bool, groups: tuple[int, int, Any], op: Function) -> None:
    """Against the oracle on logits of three values, so that most rows tie, between groups too."""
    num_groups, top_groups, group_score = groups
    spec = RouterSpec(
        num_experts=EXPERTS,
        top_k=5,
        score=score,
        use_bias=use_bias,
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
        normalise="max_sum",
        min_sum=0.4,
        scale=1.5,
    )
    logits_TE = torch.randint(0, 3, (200, EXPERTS), generator=torch.Generator().manual_seed(3)) / 2
    bias_E = torch.full((EXPERTS,), -0.25)
    routing = route(logits_TE, spec, correction_bias_E=bias_E if use_bias else None, op=op)
    for logits, ids, weights in zip(logits_TE.tolist(), *(column.tolist() for column in routing), strict=True):
        expected_ids, expected_weights = oracle(logits, bias_E.tolist(), spec)
        assert ids == expected_ids
        assert weights == pytest.approx(expected_weights, rel=1e-5)


def test_signed_zeros_tie_and_infinities_order(op: Function) -> None:
    spec = RouterSpec(num_experts=6, top_k=6, score="none")
    inf = float("inf")
    ids = route(torch.tensor([[-0.0, 0.0, -inf, 3.0, inf, -1.0]]), spec, op=op).topk_ids_TK
    assert ids.tolist() == [[4, 3, 0, 1, 5, 2]]


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_any_row_gives_distinct_valid_ids_and_leaves_the_others_alone(family: str, tokens: int, op: Function) -> None:
    config = next(case.config for case in CASES if case.family == family)
    spec = SPECS[family]({"model_type": family, **config})
    bias_E = torch.linspace(-1, 1, EXPERTS) if spec.use_bias else None
    logits_TE = torch.randn((tokens, EXPERTS), generator=torch.Generator().manual_seed(5))
    clean = route(logits_TE, spec, correction_bias_E=bias_E, op=op)
    assert clean.topk_ids_TK.shape == clean.topk_weights_TK.shape == (tokens, spec.top_k)
    if tokens < 3:
        return
    for poison in (float("nan"), float("inf"), float("-inf")):
        for columns in (slice(None), slice(3, 4)):
            poisoned_TE = logits_TE.clone()
            poisoned_TE[1, columns] = poison
            routing = route(poisoned_TE, spec, correction_bias_E=bias_E, op=op)
            assert len(set(routing.topk_ids_TK[1].tolist())) == spec.top_k
            assert 0 <= routing.topk_ids_TK.min() <= routing.topk_ids_TK.max() < EXPERTS
            for row in (0, 2):
                assert torch.equal(routing.topk_ids_TK[row], clean.topk_ids_TK[row])
                assert torch.equal(routing.topk_weights_TK[row], clean.topk_weights_TK[row])


def test_a_row_has_the_same_bits_in_every_batch(op: Function) -> None:
    spec = RouterSpec(num_experts=33, top_k=3, score="softmax", normalise="sum")
    logits_TE = torch.randn((40, 33), generator=torch.Generator().manual_seed(9))
    together = route(logits_TE, spec, op=op)
    for row in range(40):
        alone = route(logits_TE[row : row + 1], spec, op=op)
        assert torch.equal(alone.topk_ids_TK[0], together.topk_ids_TK[row])
        assert torch.equal(alone.topk_weights_TK[0], together.topk_weights_TK[row])


def test_bias_and_spec_must_agree() -> None:
    logits_TE = torch.zeros((1, 4))
    with pytest.raises(ConfigError, match="use_bias is True and none"):
        route(logits_TE, RouterSpec(num_experts=4, top_k=1, use_bias=True))
    with pytest.raises(ConfigError, match="use_bias is False and one"):
        route(logits_TE, RouterSpec(num_experts=4, top_k=1), correction_bias_E=torch.zeros(4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 0, "top_k": 1}, r"num_experts \(0\)"),
        ({"num_experts": 8, "top_k": 9}, r"top_k \(9\).*8"),
        ({"num_experts": 8, "top_k": 0}, r"top_k \(0\)"),
        ({"num_experts": 8, "top_k": 2, "num_groups": 3}, r"num_experts \(8\).*num_groups \(3\)"),
        ({"num_experts": 8, "top_k": 2, "num_groups": 4, "top_groups": 5}, r"top_groups \(5\).*4"),
        ({"num_experts": 8, "top_k": 5, "num_groups": 4, "top_groups": 2}, r"top_k \(5\).*4"),
        ({"num_experts": 8, "top_k": 2, "num_groups": 8, "top_groups": 4, "group_score": "top2_sum"}, "top2_sum"),
    ],
)
def test_impossible_specs_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RouterSpec(**values)
