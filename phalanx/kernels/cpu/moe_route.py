"""C++ `moe_route`: a row at a time, nothing sorted."""

from ctypes import c_float, c_int, c_long, c_void_p

import torch
from torch import Tensor, get_num_threads

from phalanx.kernels.cpu import library
from phalanx.kernels.moe_route import GROUP_SCORES, NORMALISATIONS, SCORES, Rule
from phalanx.kernels.op import Function, Impl

ARGTYPES = (
    *(c_void_p,) * 4,  # logits, bias, ids, weights
    *(c_long, c_int, c_int),  # tokens, experts, top_k
    *(c_int, c_int, c_int, c_int, c_float),  # score, groups
    *(c_int, c_float, c_float, c_float),  # normalisation, scale
    c_int,  # threads
)


def load(dtype: torch.dtype) -> Function:
    """Bind the C function for a dtype of the logits."""
    call = library.function(f"moe_route_{library.SUFFIX[dtype]}", ARGTYPES)
    scores, group_scores, normalisations = (
        {name: code for code, name in enumerate(names)} for names in (SCORES, GROUP_SCORES, NORMALISATIONS)
    )

    def moe_route(router_logits: Tensor, correction_bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
        tokens, experts = router_logits.shape
        ids = torch.empty((tokens, rule.top_k), dtype=torch.int32)
        weights = torch.empty((tokens, rule.top_k), dtype=dtype)
        call(
            router_logits.data_ptr(),
            None if correction_bias is None else correction_bias.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            tokens,
            experts,
            rule.top_k,
            scores[rule.score],
            rule.num_groups,
            rule.top_groups,
            group_scores[rule.group_score],
            rule.group_mask,
            normalisations[rule.normalise],
            rule.eps,
            rule.min_sum,
            rule.scale,
            get_num_threads(),
        )
        return ids, weights

    return moe_route


IMPLS = (Impl("cpp", library.refuses, load, batch_invariant=True),)
