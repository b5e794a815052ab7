"""Pyramid-residual mixture: a dense feed-forward layer every token passes, corrected by its routed experts."""

from torch import Tensor


def mix(moe_TD: Tensor, mlp_TD: Tensor, coefficients_T2: Tensor) -> Tensor:
    """`c0 * moe + c1 * mlp` with `c = softmax(coefficients)`.

    Args:
        moe_TD: (T, D) output of the routed experts.
        mlp_TD: (T, D) output of the dense layer.
        coefficients_T2: (T, 2) output of the coefficient layer of the same input, before the softmax.

    Returns:
        (T, D) in the dtype of `moe_TD`; maths in fp32.

    Source: residual MoE of DeepSpeed-MoE (arXiv:2201.05596) sec. 4.
    """
    moe_weight_T1, mlp_weight_T1 = coefficients_T2.float().softmax(dim=-1).split(1, dim=-1)
    mixed_TD: Tensor = moe_weight_T1 * moe_TD + mlp_weight_T1 * mlp_TD
    return mixed_TD.to(moe_TD.dtype)
