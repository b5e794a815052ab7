"""What the expert back ends share: the shape of a layer's experts, the interface, and the activation's definition."""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.errors import ConfigError

ACTIVATIONS = ("silu", "gelu_tanh", "swiglu_clamped")


class ExpertShape(NamedTuple):
    """The routed experts of one layer on one rank, each `down(act(gate(x)) * up(x))`."""

    num_slots: int
    """Physical slots s of this rank."""
    hidden_size: int
    """D, width of a row in and out."""
    intermediate_size: int
    """I, width between."""
    activation: str = "silu"
    """One of `ACTIVATIONS`."""
    bias: bool = False
    """Gate, up and down have one."""
    alpha: float = 1.702
    """Of swiglu_clamped only, like `limit`."""
    limit: float = 7.0

    def check(self) -> None:
        """Refuse what no back end computes.

        Raises:
            ConfigError: the activation is unknown, or a size is not positive.
        """
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ConfigError(f"experts: activation {self.activation!r} is unknown; use one of {known}")
        for name, value in (("hidden_size", self.hidden_size), ("intermediate_size", self.intermediate_size)):
            if value < 1:
                raise ConfigError(f"experts: {name} is {value}; it must be positive")


class Experts(Protocol):
    """All experts of one layer that live on this rank; made by `experts.build`.

    Shapes: s slots, R rows, K choices per row, M (row, choice) pairs with a slot, D hidden, I inner width.

    Attributes:
        impl: name of the back end.
        batch_invariant: the bits of a row depend neither on the rows beside it nor on the number of threads.
        rows: (s, row_bytes) uint8, contiguous: the weights of a slot in the back end's storage form, biases included.
            It may be overwritten row by row between two calls (expert migration); nothing else is derived from it.
            Rows of two ranks are interchangeable if shape, dtype, back end and CPU type are equal.
    """

    impl: str
    batch_invariant: bool
    rows: Tensor

    def load(
        self,
        slot: int,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """Write plain weights into a slot.

        Args:
            slot: 0 ... s-1.
            gate_up: (2I, D), the I rows of gate, then those of up; any strides, cast to the dtype of the layer.
            down: (D, I).
            gate_up_bias: (2I); given if and only if the shape has biases.
            down_bias: (D), likewise.
        """

    def forward(self, x_RD: Tensor, slots_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """Weighted sum over the choices of each row: (R, D) fp32, summed in fp32 with ascending j.

        Each expert's output is rounded to x's dtype before it is weighted, so that the sum over `forward_pairs` is
        the same up to the rounding of one fp32 operation.

        Args:
            x_RD: rows in the layer's dtype; R may be 0.
            slots_RK: int32 slots 0 ... s-1; -1 = none, adds nothing.
            weights_RK: fp32; not read where the slot is -1.
        """

    def forward_pairs(self, x_RD: Tensor, slots_RK: Tensor) -> Tensor:
        """Unweighted outputs (M, D) in x's dtype, one per (row, j) with a slot, in row-major order."""


def activate(gate: Tensor, up: Tensor, shape: ExpertShape) -> Tensor:
    """The middle of an expert, in fp32: both halves (..., I) as their products gave them, biases added."""
    gate, up = gate.float(), up.float()
    if shape.activation == "silu":
        return F.silu(gate) * up
    if shape.activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    gate, up = gate.clamp(max=shape.limit), up.clamp(-shape.limit, shape.limit)
    return (up + 1) * gate * torch.sigmoid(shape.alpha * gate)
