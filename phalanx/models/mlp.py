"""Gated feed-forward, its inner width sharded over the tensor axis."""

from torch import Tensor

from phalanx.models.batch import ForwardBatch
from phalanx.models.build import BuildContext
from phalanx.models.spec import MlpSpec
from phalanx.parallel.linear import ColumnParallelLinear, RowParallelLinear
from phalanx.parallel.parameter import Parameter
from phalanx.parallel.partition import shard


class Mlp:
    """`down(act(gate(x)) * up(x))`, gate and up in one product.

    Args:
        spec: global width and activation.
        context: what all parts of a decoder share.
    """

    def __init__(self, spec: MlpSpec, context: BuildContext) -> None:
        tp = context.mesh.tp
        part = shard("intermediate_size", spec.intermediate_size, tp.rank, tp.size)
        self._activation = spec.activation
        self._act_mul = context.ops.act_mul
        self._gate_up_proj = ColumnParallelLinear(
            context.hidden_size, {"gate": part, "up": part}, bias=spec.bias, **context.linear
        )
        self._down_proj = RowParallelLinear(part, context.hidden_size, tp, bias=spec.bias, **context.linear)

    def parameters(self) -> dict[str, Parameter]:
        """What the checkpoint must fill."""
        parameters = {f"gate_up_proj.{name}": parameter for name, parameter in self._gate_up_proj.parameters().items()}
        return parameters | {f"down_proj.{name}": value for name, value in self._down_proj.parameters().items()}

    def finalize(self) -> None:
        """Pack the weights; call once, after loading."""
        self._gate_up_proj.finalize()
        self._down_proj.finalize()

    def __call__(self, x: Tensor, batch: ForwardBatch | None = None) -> Tensor:
        """Map (T, hidden) to (T, hidden); every row by itself, whatever the batch."""
        return self._down_proj(self._act_mul(self._gate_up_proj(x), self._activation))
