"""The router of every family: from router logits to k experts per token and their weights.

Shapes: T tokens, E logical experts, K experts per token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.errors import ConfigError
from phalanx.kernels import moe_route
from phalanx.kernels.op import Function
from phalanx.moe.spec import RouterSpec


class Routing(NamedTuple):
    """Which experts each token visits, best first, and with what weight."""

    topk_ids_TK: Tensor
    """(T, K) int32 logical experts, distinct within a row; -1 = none (dropped by a capacity)."""
    topk_weights_TK: Tensor
    """(T, K) fp32; 0 where the id is -1."""


def route(
    router_logits_TE: Tensor,
    spec: RouterSpec,
    *,
    correction_bias_E: Tensor | None = None,
    model_dtype: torch.dtype = torch.float32,
    op: Function = moe_route.reference,
) -> Routing:
    """Choose `spec.top_k` experts per token; a row depends on nothing but itself, and equal scores go to the lower id.

    A row with NaN gets valid ids and whatever weights come out; T = 0 is legal.

    Args:
        router_logits_TE: (T, E) logits of the gate, any float dtype; all maths is fp32.
        spec: the rule.
        correction_bias_E: (E) fp32, exactly if `spec.use_bias`.
        model_dtype: what weights are rounded to if `spec.weights_in_model_dtype`.
        op: `moe_route`, bound for fp32.

    Raises:
        ConfigError: there is no bias and the spec has one, or the reverse.

    Source: the router classes of transformers 5.23, as `tests/moe/test_routers_hf.py` compares them.
    """
    if (correction_bias_E is not None) != spec.use_bias:
        given = "none" if correction_bias_E is None else "one"
        raise ConfigError(f"router: use_bias is {spec.use_bias} and {given} was given; make the two agree")
    ids_TK, weights_TK = op(router_logits_TE.float().contiguous(), correction_bias_E, spec)
    if spec.weights_in_model_dtype:
        weights_TK = weights_TK.to(model_dtype).float()
    return Routing(ids_TK, weights_TK)
