"""Residual add and RMS norm in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from phalanx.kernels.op import Cost, Op


def reference(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add `x` to the residual stream and normalise the sum.

    Args:
        x: (T, H), activation dtype, contiguous.
        residual: (T, H), same dtype, contiguous; None at the first norm, then x itself is the stream.
        weight: (H) fp32, any unit offset already folded in.
        eps: added to the mean square.

    Returns:
        The normalised rows and the new residual, both (T, H) in x's dtype. The sum is rounded to that dtype before
        it is normalised, so that both results describe the same stream.
    """
    if residual is not None:
        x = (x.float() + residual.float()).to(x.dtype)
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * scale * weight).to(x.dtype), x


class Problem(NamedTuple):
    """Static facts of a call."""

    tokens: int
    hidden: int
    residual: bool = True


def make_inputs(problem: Problem, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """Random rows with a large spread of magnitudes."""
    shape = (problem.tokens, problem.hidden)
    x = torch.randn(shape, generator=generator) * 3
    residual = torch.randn(shape, generator=generator).to(dtype) if problem.residual else None
    weight = 1 + 0.3 * torch.randn(problem.hidden, generator=generator)
    return {"x": x.to(dtype), "residual": residual, "weight": weight, "eps": 1e-6}


def cost(problem: Problem, dtype: torch.dtype) -> Cost:
    """Two tensors read, two written (one of each without a residual)."""
    tensors = 4 if problem.residual else 2
    elements = problem.tokens * problem.hidden
    return Cost(tensors * elements * dtype.itemsize, 4 * elements)


SHAPES = ((0, 64), (1, 64), (3, 96), (7, 1000), (70, 1024))
OP = Op(
    name="add_rms_norm",
    reference=reference,
    make_inputs=make_inputs,
    cost=cost,
    problems={
        "test": tuple(Problem(*shape, residual) for shape in SHAPES for residual in (True, False)),
        "bench": (Problem(1, 1024), Problem(8, 1024), Problem(32, 1024), Problem(256, 1024)),
    },
)
