"""Gated activation: silu(gate) * up, the middle of a SwiGLU (or gelu: GeGLU) feed-forward layer."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.errors import ConfigError
from phalanx.kernels.op import Cost, Op

ACTIVATIONS = ("silu", "gelu_tanh")


def reference(gate_up: Tensor, activation: str) -> Tensor:
    """Activate the first half of each row and multiply by the second.

    Args:
        gate_up: (T, 2F), gate then up, contiguous.
        activation: "silu" or "gelu_tanh".

    Returns:
        (T, F) in the same dtype; maths in fp32.

    Raises:
        ConfigError: the activation is unknown.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    if activation == "silu":
        return (F.silu(gate) * up).to(gate_up.dtype)
    if activation == "gelu_tanh":
        return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)
    raise ConfigError(f"activation {activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")


class Problem(NamedTuple):
    """Static facts of a call."""

    tokens: int
    ffn: int
    activation: str = "silu"


def make_inputs(problem: Problem, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """Random rows, wide enough to reach both flat ends of the activation."""
    gate_up = torch.randn((problem.tokens, 2 * problem.ffn), generator=generator) * 4
    return {"gate_up": gate_up.to(dtype), "activation": problem.activation}


def cost(problem: Problem, dtype: torch.dtype) -> Cost:
    """Read 2F, write F per token."""
    elements = problem.tokens * problem.ffn
    return Cost(3 * elements * dtype.itemsize, 6 * elements)


OP = Op(
    name="act_mul",
    reference=reference,
    make_inputs=make_inputs,
    cost=cost,
    problems={
        "test": tuple(Problem(t, f, a) for t, f in ((0, 32), (1, 48), (5, 1000), (70, 256)) for a in ACTIVATIONS),
        "bench": (Problem(1, 3072), Problem(8, 3072), Problem(32, 3072), Problem(256, 3072)),
    },
)
