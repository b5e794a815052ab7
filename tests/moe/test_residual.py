"""The residual mix against the formula, per element. Milliseconds."""

import math

import pytest
import torch

from phalanx.moe.residual import mix


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_equals_the_formula(tokens: int) -> None:
    generator = torch.Generator().manual_seed(2)
    moe, mlp = (torch.randn((tokens, 3), generator=generator) for _ in range(2))
    coefficients = torch.randn((tokens, 2), generator=generator) * 3
    out = mix(moe, mlp, coefficients)
    assert out.shape == (tokens, 3)
    for t in range(tokens):
        a, b = (math.exp(c) for c in coefficients[t].tolist())
        for d in range(3):
            expected = a / (a + b) * moe[t, d].item() + b / (a + b) * mlp[t, d].item()
            assert out[t, d].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_sides_and_dtype() -> None:
    """A coefficient that wins outright gives its side's bits, the first one the experts'; bf16 stays bf16."""
    moe, mlp = torch.full((2, 4), 2.0, dtype=torch.bfloat16), torch.full((2, 4), -3.0, dtype=torch.bfloat16)
    out = mix(moe, mlp, torch.tensor([[200.0, 0.0], [0.0, 200.0]]))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.stack([moe[0], mlp[0]]))
