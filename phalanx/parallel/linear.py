"""Linear layers sharded over the tensor axis.

    column parallel   y_local = x @ W[rows of this rank].T            no communication
    row parallel      y = all_reduce(x_local @ W[:, columns].T) + b   one all-reduce, the bias added once after it

A layer is built empty, filled through its `parameters`, then `finalize` packs the weight for the device and drops the
plain one. Source: Megatron-LM (arXiv:1909.08053) sec. 3.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from phalanx.kernels.linear import PackedLinear, pack
from phalanx.parallel.group import Group
from phalanx.parallel.parameter import WHOLE, Parameter, Segment
from phalanx.parallel.partition import Part, whole


class ColumnParallelLinear:
    """Output features are sharded; several projections of one input may be stacked as named segments.

    Args:
        in_features: width of the input, the same on all ranks.
        parts: segment name (for example q, k, v) -> the output features of it that this rank holds, in order.
        bias: whether the checkpoint has one per segment.
        dtype: of the weight.
        device: of the weight.
        choose: kernel name -> implementation name; None = the best.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, Part],
        *,
        bias: bool = False,
        dtype: torch.dtype,
        device: torch.device,
        choose: Mapping[str, str] | None = None,
    ) -> None:
        weight: dict[str, Segment] = {}
        vector: dict[str, Segment] = {}
        offset = 0
        for name, part in parts.items():
            weight[name] = Segment((part.total, in_features), 0, part, offset)
            vector[name] = Segment((part.total,), 0, part, offset)
            offset += part.size
        self.weight: Parameter | None = Parameter((offset, in_features), weight, dtype=dtype, device=device)
        self.bias = Parameter((offset,), vector, dtype=dtype, device=device) if bias else None
        self._choose = choose
        self._packed: PackedLinear | None = None

    def parameters(self) -> dict[str, Parameter]:
        """What the checkpoint must fill."""
        return _named(self.weight, self.bias)

    def finalize(self) -> None:
        """Pack the weight; call once, after loading."""
        if self.weight is not None:
            self._packed = pack(self.weight.tensor, self.bias.tensor if self.bias else None, choose=self._choose)
            self.weight = None

    def __call__(self, x: Tensor) -> Tensor:
        """Map (T, in_features) to (T, this rank's output features), the segments side by side."""
        assert self._packed is not None, "finalize() first"
        return self._packed(x)


class RowParallelLinear:
    """Input features are sharded; every rank gets the whole output.

    Args:
        part: the input features this rank holds.
        out_features: width of the output.
        group: the tensor axis.
        bias: whether the checkpoint has one.
        dtype: of the weight.
        device: of the weight.
        choose: kernel name -> implementation name; None = the best.
    """

    def __init__(
        self,
        part: Part,
        out_features: int,
        group: Group,
        *,
        bias: bool = False,
        dtype: torch.dtype,
        device: torch.device,
        choose: Mapping[str, str] | None = None,
    ) -> None:
        segment = Segment((out_features, part.total), 1, part)
        vector = Segment((out_features,), 0, whole(out_features))
        self.weight: Parameter | None = Parameter(
            (out_features, part.size), {WHOLE: segment}, dtype=dtype, device=device
        )
        self.bias = Parameter((out_features,), {WHOLE: vector}, dtype=dtype, device=device) if bias else None
        self._group = group
        self._choose = choose
        self._packed: PackedLinear | None = None

    def parameters(self) -> dict[str, Parameter]:
        """What the checkpoint must fill."""
        return _named(self.weight, self.bias)

    def finalize(self) -> None:
        """Pack the weight; call once, after loading."""
        if self.weight is not None:
            # With several ranks the bias must not be summed, so it stays out of the packed product.
            inner = self.bias.tensor if self.bias and self._group.size == 1 else None
            self._packed = pack(self.weight.tensor, inner, choose=self._choose)
            self.weight = None

    def __call__(self, x: Tensor) -> Tensor:
        """Map (T, this rank's input features) to (T, out_features), summed over the group."""
        assert self._packed is not None, "finalize() first"
        y = self._packed(x)
        if self._group.size > 1:
            self._group.all_reduce(y)
            if self.bias:
                y += self.bias.tensor
        return y


def _named(weight: Parameter | None, bias: Parameter | None) -> dict[str, Parameter]:
    both = {"weight": weight, "bias": bias}
    return {name: parameter for name, parameter in both.items() if parameter is not None}
